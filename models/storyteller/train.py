"""Train the storyteller, a small GPT-2, on a CPU.

    python train.py --corpus corpus --output checkpoint --compile

Reads the arrays that `tokenize_corpus.py` wrote and writes a Hugging Face checkpoint, in float32. The
matrices inside the blocks are trained with Muon (https://kellerjordan.github.io/posts/muon/), everything else
with AdamW, and the forward pass runs under bfloat16 autocast.

The run is measured in minutes, not in steps. The learning rate, the share of fairy tales and the length of
the windows all follow the share of the time that has passed, so a faster machine sees more text, and two runs
differ a little even on the same machine.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import GPT2Config, GPT2LMHeadModel

SEED = 0

VOCABULARY_SIZE = 8192
END_OF_TEXT = 0
LAYERS = 6
HEADS = 4
WIDTH = 256
WINDOW = 512

ADAMW_LEARNING_RATE = 3e-3
ADAMW_BETAS = (0.9, 0.95)
ADAMW_EPSILON = 1e-10
MUON_LEARNING_RATE = 0.02
MUON_MOMENTUM = 0.95
MUON_WEIGHT_DECAY = 0.01
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
LARGEST_GRADIENT_NORM = 1.0
WARM_UP_STEPS = 100
# Share of the time after which the learning rate falls, in a straight line, to zero at the end.
DECAY_FROM = 0.5

# Chance that a window is a fairy tale, up to each share of the time; after the last one all windows are. The
# other fiction comes early, for the language; the fairy tales come last, for the manner.
FAIRY_CHANCES = ((0.35, 0.3), (0.6, 0.6))
# Until this share of the time every window is cut into halves, afterwards most batches are. Short windows are
# faster, and a few long ones teach the second half of the positions.
HALVES_ONLY_UNTIL = 0.3
WHOLE_WINDOWS_CHANCE = 0.3

# The held-out loss is taken on windows spread over the beginning of the held-out books.
EVALUATION_WINDOWS = 40
EVALUATION_BATCH = 8
EVALUATION_STRIDE = 3 * WINDOW

EARLY_REPORTS = frozenset({1, 2, 5, 10, 20, 50})
STEPS_PER_REPORT = 100
STEPS_PER_CHECKPOINT = 400
LOSS_SMOOTHING = 0.98

Tokens: TypeAlias = npt.NDArray[np.uint16]
Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
LossFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def load_tokens(path: Path, fewest: int) -> Tokens:
    """Read an array of tokens and make sure that it is long enough to cut windows from."""
    try:
        tokens: Tokens = np.load(path)
    except FileNotFoundError:
        raise SystemExit(f"No {path}: run tokenize_corpus.py first, or name its folder with --corpus") from None
    if len(tokens) < fewest:
        raise SystemExit(f"{path} holds {len(tokens)} tokens: training needs {fewest} or more")
    return tokens


def build_model(attention: str) -> GPT2LMHeadModel:
    """Make the untrained model, without dropout: most of the text is seen only once.

    Args:
        attention: transformers' implementation of attention, "eager" or "sdpa".
    """
    # transformers leaves its constructors untyped.
    config = GPT2Config(  # type: ignore[no-untyped-call]
        vocab_size=VOCABULARY_SIZE,
        n_positions=WINDOW,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        attn_implementation=attention,
        activation_function="gelu_pytorch_tanh",
    )
    return GPT2LMHeadModel(config)  # type: ignore[no-untyped-call]


def make_loss(model: GPT2LMHeadModel, compiled: bool) -> LossFunction:
    """Make the function from inputs and targets, both [rows, positions], to the mean loss in nats a token."""

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(inputs, use_cache=False).logits
        rows = logits.float().view(-1, VOCABULARY_SIZE)
        return torch.nn.functional.cross_entropy(rows, targets.reshape(-1))

    return torch.compile(loss) if compiled else loss


def shuffled_windows(tokens: Tokens, offset: int, random: np.random.Generator) -> Iterator[Tokens]:
    """Cut the tokens from `offset` on into windows and give them in random order.

    Each window holds one token more than the model reads: its last token is the target of the one before.
    """
    count = (len(tokens) - offset - 1) // WINDOW
    for start in offset + WINDOW * random.permutation(count):
        yield tokens[start : start + WINDOW + 1]


def endless_windows(tokens: Tokens, random: np.random.Generator) -> Iterator[Tokens]:
    """Give the windows of the tokens again and again, cut in other places each time."""
    while True:
        yield from shuffled_windows(tokens, int(random.integers(0, WINDOW)), random)


def fairy_chance(progress: float) -> float:
    """Give the chance that a window is a fairy tale, at a share of the time."""
    for until, chance in FAIRY_CHANCES:
        if progress < until:
            return chance
    return 1.0


class BatchMaker:
    """Draws batches of windows from the fairy tales and the other fiction.

    The other fiction is read once at most, the fairy tales as often as it takes.
    """

    def __init__(self, fairy: Tokens, fiction: Tokens, windows_per_batch: int) -> None:
        # One generator for everything: the order in which it is asked is a part of the recipe.
        self._random = np.random.default_rng(SEED)
        self._fairy = endless_windows(fairy, self._random)
        self._fiction = shuffled_windows(fiction, 0, self._random)
        self._windows_per_batch = windows_per_batch

    def next_batch(self, progress: float) -> Batch:
        """Draw the inputs and targets for one step, both [windows, 512] or [2 * windows, 256].

        Args:
            progress: Share of the training time that has passed.
        """
        chance = fairy_chance(progress)
        windows = np.stack([self._next_window(chance) for _ in range(self._windows_per_batch)])
        inputs, targets = inputs_and_targets(windows)
        if progress < HALVES_ONLY_UNTIL or self._random.random() > WHOLE_WINDOWS_CHANCE:
            return inputs.reshape(-1, WINDOW // 2), targets.reshape(-1, WINDOW // 2)
        return inputs, targets

    def _next_window(self, chance: float) -> Tokens:
        if self._random.random() > chance:
            window = next(self._fiction, None)
            if window is not None:
                return window
        return next(self._fairy)


def inputs_and_targets(windows: Tokens) -> Batch:
    """Split windows [rows, positions + 1] into what the model reads and what it is to predict."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of a matrix near 1, by Newton-Schulz steps in bfloat16.

    The coefficients are Muon's: they trade exactness, which training does not need, for few steps.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    if is_tall:
        x = x.T
    norm: torch.Tensor = x.norm()
    x = x / (norm + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).float()


class Muon:
    """Momentum whose steps are orthogonalized, with Nesterov's look ahead and decoupled weight decay.

    Not `torch.optim.Muon`: that one does not know that a GPT-2 block holds the query, key and value matrices
    side by side in one, nor that its matrices are stored as [inputs, outputs].
    """

    def __init__(self, matrices: list[torch.nn.Parameter]) -> None:
        self._matrices = matrices
        self._momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every matrix from its gradient."""
        for matrix, momentum in zip(self._matrices, self._momenta, strict=True):
            gradient = matrix.grad
            if gradient is None:
                raise RuntimeError("Muon.step() before backward(): a matrix has no gradient")
            momentum.mul_(MUON_MOMENTUM).add_(gradient)
            direction = self._direction(gradient.add(momentum, alpha=MUON_MOMENTUM))
            matrix.mul_(1 - learning_rate * MUON_WEIGHT_DECAY).add_(direction, alpha=-learning_rate)

    @staticmethod
    def _direction(gradient: torch.Tensor) -> torch.Tensor:
        """Orthogonalize a gradient [inputs, outputs]; query, key and value matrices each on its own."""
        parts = gradient.chunk(3, 1) if gradient.size(1) == 3 * WIDTH else (gradient,)
        scales = (max(1, part.size(1) / part.size(0)) ** 0.5 for part in parts)
        return torch.cat([orthogonalize(part) * scale for part, scale in zip(parts, scales, strict=True)], 1)


def split_parameters(model: GPT2LMHeadModel) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Separate the matrices inside the blocks, which Muon trains, from all other parameters."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".h." in name else others).append(parameter)
    return matrices, others


def learning_rate_factor(step: int, progress: float) -> float:
    """Give the factor on both learning rates: up over the first steps, down over the second half of the time.

    Args:
        step: Number of steps done.
        progress: Share of the training time that has passed.
    """
    warm_up = min(1, (step + 1) / WARM_UP_STEPS)
    decay = 1 if progress < DECAY_FROM else (1 - progress) / (1 - DECAY_FROM)
    return warm_up * decay


@torch.no_grad()
def held_out_loss(loss: LossFunction, tokens: Tokens) -> float:
    """Measure the mean loss, in nats a token, on windows of 512 tokens of the held-out books."""
    losses = []
    for first in range(0, EVALUATION_WINDOWS, EVALUATION_BATCH):
        starts = [EVALUATION_STRIDE * window for window in range(first, first + EVALUATION_BATCH)]
        windows = np.stack([tokens[start : start + WINDOW + 1] for start in starts])
        losses.append(loss(*inputs_and_targets(windows)).item())
    return float(np.mean(losses))


def save_checkpoint(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write the checkpoint aside and move it into place: a broken-off run leaves no half-written file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as temporary:
        model.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            file.replace(folder / file.name)


def train(corpus: Path, output: Path, minutes: float, batch_size: int, attention: str, compiled: bool) -> None:
    """Train from scratch and write the checkpoint, every 400 steps and at the end.

    Args:
        corpus: Folder that `tokenize_corpus.py` wrote.
        output: Folder for the checkpoint; made if missing.
        minutes: How long to train.
        batch_size: Windows of 512 tokens in a step.
        attention: transformers' implementation of attention, "eager" or "sdpa".
        compiled: Whether to compile the loss with `torch.compile`.
    """
    # The fairy tales are cut from a random place on, below WINDOW, and must give a window even so.
    fairy = load_tokens(corpus / "fairy.npy", fewest=2 * WINDOW)
    fiction = load_tokens(corpus / "fiction.npy", fewest=WINDOW + 1)
    held_out = load_tokens(corpus / "held_out.npy", fewest=(EVALUATION_WINDOWS - 1) * EVALUATION_STRIDE + WINDOW + 1)

    torch.manual_seed(SEED)
    model = build_model(attention)
    print(f"{model.num_parameters() / 1e6:.2f} million parameters")
    loss = make_loss(model, compiled)
    batches = BatchMaker(fairy, fiction, batch_size)
    matrices, others = split_parameters(model)
    adamw = torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=ADAMW_BETAS, eps=ADAMW_EPSILON, weight_decay=0.0)
    muon = Muon(matrices)

    step = 0
    tokens_seen = 0
    smooth_loss = math.nan
    start = time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        factor = learning_rate_factor(step, progress)
        for group in adamw.param_groups:
            group["lr"] = ADAMW_LEARNING_RATE * factor

        inputs, targets = batches.next_batch(progress)
        step_loss = loss(inputs, targets)
        step_loss.backward()  # type: ignore[no-untyped-call]
        # Only what AdamW trains: a step of Muon is as long as it is, however long the gradient.
        torch.nn.utils.clip_grad_norm_(others, LARGEST_GRADIENT_NORM)
        adamw.step()
        muon.step(MUON_LEARNING_RATE * factor)
        model.zero_grad(set_to_none=True)

        step += 1
        tokens_seen += inputs.numel()
        latest = step_loss.item()
        smooth_loss = latest if step == 1 else LOSS_SMOOTHING * smooth_loss + (1 - LOSS_SMOOTHING) * latest
        if step in EARLY_REPORTS or step % STEPS_PER_REPORT == 0:
            speed = tokens_seen / (time.monotonic() - start)
            print(
                f"step {step}: {progress:.1%} of the time, loss {smooth_loss:.3f}, "
                f"{tokens_seen / 1e6:.1f} million tokens, {speed:.0f} tokens/s",
                flush=True,
            )
        if step % STEPS_PER_CHECKPOINT == 0:
            print(f"step {step}: held-out loss {held_out_loss(loss, held_out):.4f}", flush=True)
            save_checkpoint(model, output)

    save_checkpoint(model, output)
    print(f"final held-out loss {held_out_loss(loss, held_out):.4f}")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description="Train the storyteller, a small GPT-2, on a CPU. "
        "The checkpoint in this folder was trained with the defaults and --compile.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path("corpus"),
        metavar="FOLDER",
        help="folder that tokenize_corpus.py wrote",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("checkpoint"),
        metavar="FOLDER",
        help="where to write the checkpoint",
    )
    parser.add_argument("--minutes", type=float, default=92.0, help="how long to train")
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 512 tokens in a step")
    parser.add_argument(
        "--attention",
        choices=("eager", "sdpa"),
        default="eager",
        help="transformers' implementation of attention",
    )
    parser.add_argument("--compile", action="store_true", help="compile the loss (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or arguments.batch_size < 1:
        parser.error("--minutes must be above 0 and --batch-size 1 or more")

    torch.set_num_threads(arguments.threads)
    train(
        corpus=arguments.corpus,
        output=arguments.output,
        minutes=arguments.minutes,
        batch_size=arguments.batch_size,
        attention=arguments.attention,
        compiled=arguments.compile,
    )


if __name__ == "__main__":
    main()
