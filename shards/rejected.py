"""What to say when more samples are broken than may be."""

from shards.errors import UserError

LISTED = 10


def too_many(rejected: list[tuple[str, str]], allowed: int, what: str, source: str, remedy: str) -> UserError:
    """Return the error that ends a run.

    Args:
        rejected: (where, reason) of each broken image or sample.
        allowed: So many were.
        what: ``image`` or ``sample``.
        source: Where they are from.
        remedy: What to do.
    """
    count = len(rejected)
    listed = ", ".join(f"{where} ({reason})" for where, reason in sorted(rejected)[:LISTED])
    more = f" and {count - LISTED} more" if count > LISTED else ""
    return UserError(
        f"{count} broken {what}{'s' * (count > 1)} in {source} so far, {allowed} allowed: {listed}{more}; {remedy}"
    )
