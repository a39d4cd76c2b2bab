"""What a resumed stream of batches must agree on with the one that it goes on with."""

from typing import Any

from shards.errors import UserError

_DATA = {"data", "exclude"}


def check_identity(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Compare what a stream is with what the stream of a checkpoint was.

    Args:
        now: Order, seed, digest of the data, drop list and so on, by name.
        then: The same of the checkpoint, and maybe more.

    Raises:
        UserError: They differ. It names everything that does, and what to do.
    """
    differing = [name for name in now if now[name] != then.get(name)]
    if not differing:
        return
    told = "; ".join(f"{name} is {_shown(now[name])}, was {_shown(then.get(name))}" for name in differing)
    if _DATA & set(differing):
        remedy = (
            "the samples are others than those of the checkpoint, so they would come in another order: give it the "
            "data set and drop list of then, or start a new run from the checkpoint's weights"
        )
    else:
        remedy = "use the settings and versions of the checkpoint, or start a new run"
    raise UserError(f"cannot resume the data stream: {told}; {remedy}")


def _shown(value: Any) -> str:
    """Return a value as text; of digests the beginning."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
