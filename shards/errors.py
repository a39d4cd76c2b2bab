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
