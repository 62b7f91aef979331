"""Read the graph of a model folder, or of a pack, with its weights where they lie."""

from pathlib import Path

import onnx_ir

from gpt2_edge.folder import ModelFolder


def read_model(folder: ModelFolder) -> onnx_ir.Model:
    """Return the decoder's graph; its weights are read from the opened files when they are used."""
    import onnx

    graph = folder.content(folder.manifest.graphs["decoder"])
    model: onnx_ir.Model = onnx_ir.from_proto(onnx.ModelProto.FromString(graph.read()))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, onnx_ir.ExternalTensor):
            continue
        content = folder.content(str(tensor.location))
        file = Path(content.file.identity.path)
        value.const_value = onnx_ir.ExternalTensor(
            file.name,
            content.offset + (tensor.offset or 0),
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=value.name or "",
            base_dir=file.parent,
        )
    return model
