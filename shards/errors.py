"""The one exception family of Patchmill and its exit codes; here, because every package may import shards."""


class PatchmillError(Exception):
    """Anything Patchmill itself reports: one line that says what is wrong, the value, and what to do."""

    exit_code = 1

    def __str__(self) -> str:
        # What is quoted in it, such as a file's name or another library's words, may have several lines.
        return " ".join(super().__str__().splitlines())


class UserError(PatchmillError):
    """A mistake that the user can mend: settings, paths, data. Found before the first training step."""

    exit_code = 2


class StoppedOnRequestError(PatchmillError):
    """The run was asked to stop and everything is saved: start it again to go on."""

    exit_code = 75


TOLD = (UserError.exit_code, StoppedOnRequestError.exit_code)
"""Exit codes that say why: a rank that ends with one knows more than those that only lost it."""


def error_of(code: int) -> type[PatchmillError]:
    """Return the kind of error that a process ended of, by its exit code."""
    return next((kind for kind in (UserError, StoppedOnRequestError) if kind.exit_code == code), PatchmillError)
