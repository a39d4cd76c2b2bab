"""Any checkpoint of ours -> one safetensors file with timm's names, ready for fine-tuning."""

import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

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


def to_safetensors(source: str | Path, destination: str | Path, which: str = "latest", ema: bool = False) -> dict:
    """Convert a checkpoint, whatever engine, ZeRO stage and number of ranks wrote it; a decoder stays behind.

    Args:
        source: As in ``find_checkpoint``.
        destination: File to write.
        which: As in ``find_checkpoint``.
        ema: Take the moving average of the weights.

    Returns:
        ``weights`` (path), ``samples``, ``parameters`` (their number).
    """
    found = find_checkpoint(source, which)
    tensors = {name: tensor for name, tensor in _weights(found, ema) if not name.startswith(DECODER)}
    note = {
        "model": {key: value for key, value in found.state["model"].items() if not key.startswith("decoder_")},
        "classes": found.state["classes"],
        "samples": found.samples,
        "ema": ema,
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


def load_model(source: str | Path, ema: bool = False) -> tuple[nn.Module, list[str]]:
    """Return (model on the CPU in evaluation mode, class names) of a weights file, a checkpoint or a stage's folder.

    With ``ema``, of a checkpoint or folder, the model of the moving average of the weights.
    """
    if not Path(source).is_dir():
        weights = Weights(source)
        if ema:
            raise UserError(f"{source} holds one set of weights; give the checkpoint, or make it with `convert --ema`")
        return weights.create_model(), weights.classes
    found = find_checkpoint(source)
    model = create_model(**found.state["model"], seed=None)
    model.load_state_dict(dict(_weights(found, ema)))
    return model.eval(), found.state["classes"]


def _weights(found: checkpoint.Checkpoint, ema: bool) -> Iterable[tuple[str, Tensor]]:
    if ema and found.state["settings"]["optim"].get("ema") is None:
        raise UserError(
            f"{found.path} has no moving average of the weights; train with optim.ema, or take the weights themselves"
        )
    return found.weights(ema)
