"""Any checkpoint of ours -> one safetensors file with timm's names, ready for fine-tuning."""

import sys
from pathlib import Path

from torch import nn

from pipeline import checkpoint
from pipeline.models import create_model
from pipeline.weights import DECODER, Weights, write_weights
from shards.errors import UserError


def find_checkpoint(source: str | Path, which: str = "latest") -> checkpoint.Checkpoint:
    """Return the verified checkpoint at ``source``: a checkpoint folder, or a training stage's folder.

    Args:
        source: The folder.
        which: For a stage's folder, the pointer to follow: ``"latest"`` or ``"best"``.

    Raises:
        UserError: There is none.
        BrokenCheckpointError: It was named, and does not pass verification.
    """
    source = Path(source)
    if (source / "checkpoint.json").is_file():
        found = checkpoint.Checkpoint(source)
        found.verify()
        return found
    folder = source / "checkpoints"
    candidates = checkpoint.whole_checkpoints(folder) if which == "latest" else [checkpoint.pointer(folder, which)]
    for path in filter(None, candidates):
        try:
            found = checkpoint.Checkpoint(path)
            found.verify()
        except checkpoint.BrokenCheckpointError as error:
            print(f"warning: {error} (falling back to the one before)", file=sys.stderr)
            continue
        return found
    raise UserError(
        f"there is no whole {which} checkpoint in {source}; give a checkpoint folder, or the folder of a training "
        "stage that saved one"
    )


def to_safetensors(source: str | Path, destination: str | Path, which: str = "latest") -> dict:
    """Convert a checkpoint, whatever engine, ZeRO stage and number of ranks wrote it; a decoder stays behind.

    Returns:
        ``weights`` (path), ``samples``, ``parameters`` (their number).
    """
    found = find_checkpoint(source, which)
    tensors = {name: tensor for name, tensor in found.weights() if not name.startswith(DECODER)}
    note = {
        "model": {key: value for key, value in found.state["model"].items() if not key.startswith("decoder_")},
        "classes": found.state["classes"],
        "samples": found.samples,
        "val": found.state["val"],
        "commit": found.state["commit"],
        "versions": found.state["versions"],
    }
    write_weights(Path(destination), tensors, note)
    return {
        "weights": str(destination),
        "samples": found.samples,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }


def load_model(source: str | Path) -> tuple[nn.Module, list[str]]:
    """Return (model on the CPU in evaluation mode, class names) of a weights file, a checkpoint or a stage's folder."""
    if not Path(source).is_dir():
        weights = Weights(source)
        return weights.create_model(), weights.classes
    found = find_checkpoint(source)
    model = create_model(**found.state["model"], seed=None)
    model.load_state_dict(dict(found.weights()))
    return model.eval(), found.state["classes"]
