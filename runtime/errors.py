"""Every error that gpt2-edge raises on purpose.

Gpt2EdgeError
├── OptionError                an option of a call has a value that is not allowed
├── PromptError                a prompt or text cannot be used
│   └── ContextLengthError     it has more tokens than the model's context
├── DeviceError                the GPU that was asked for cannot be used, or not for this model
├── ModelFolderError           a model folder is missing, damaged or not made for this version
├── CheckpointError            a checkpoint cannot be read or cannot be exported exactly
├── ParityError                an exported graph does not compute what the checkpoint computes
├── QuantizationError          a model folder cannot be quantized as asked
├── SessionError               a text session is used wrongly, or its file is damaged or another model's
├── MachineError               this machine does not compute what the model folder should
├── LogitsError                the model produced NaN or nothing that can be chosen
├── ModelClosedError           a model was used after `close()`
└── MissingDependencyError     a package that only some commands need is not installed

Messages say what was given, what is allowed and what to do.
"""


class Gpt2EdgeError(Exception):
    """Base of every error that gpt2-edge raises on purpose."""


class OptionError(Gpt2EdgeError, ValueError):
    """An option of a call has a value that is not allowed."""


class PromptError(Gpt2EdgeError, ValueError):
    """A prompt or a text to score cannot be used."""


class ContextLengthError(PromptError):
    """A prompt has more tokens than the model's context.

    Attributes:
        tokens: How many tokens were given.
        context_length: How many the model can hold.
    """

    def __init__(self, tokens: int, context_length: int) -> None:
        surplus = tokens - context_length
        super().__init__(
            f"the prompt has {tokens} tokens, the model's context holds {context_length}: "
            f"shorten the prompt by at least {surplus} token{'' if surplus == 1 else 's'}"
        )
        self.tokens = tokens
        self.context_length = context_length

    def __reduce__(self) -> tuple[type["ContextLengthError"], tuple[int, int]]:
        return type(self), (self.tokens, self.context_length)  # as processes send it to each other


class ModelFolderError(Gpt2EdgeError):
    """A model folder is missing, damaged, or not made for this version."""


class UnsealedFolderWarning(UserWarning):
    """A folder without a manifest was loaded: nothing tells whether its files are whole."""


class DeviceError(Gpt2EdgeError):
    """The GPU that was asked for cannot be used, or cannot run this model."""


class CheckpointError(Gpt2EdgeError):
    """A checkpoint cannot be read, or cannot be exported exactly."""


class ParityError(Gpt2EdgeError):
    """An exported graph does not compute what the checkpoint computes."""


class QuantizationError(Gpt2EdgeError):
    """A model folder cannot be quantized as asked."""


class SessionError(Gpt2EdgeError):
    """A text session is in use already, or its saved file cannot be used."""


class MachineError(Gpt2EdgeError):
    """This machine does not compute what the model folder should: its processor is at fault, or a kernel for it."""


class LogitsError(Gpt2EdgeError):
    """No token can be chosen: the model's logits, the options or the logits processor leave none."""


class ModelClosedError(Gpt2EdgeError):
    """A model was used after it was closed."""


class MissingDependencyError(Gpt2EdgeError, ImportError):
    """A package that this part of gpt2-edge needs is not installed."""
