"""What a launcher is to start."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """The ranks of one command.

    Attributes:
        command: Arguments of ``patchmill``.
        logs: Folder of logs, which all nodes see.
        ranks: On all nodes together.
        nodes: Which share them evenly.
        address: Of the node that has rank 0.
        port: That is free there.
        folder: That the launcher is started in, if not in this one.
    """

    command: list[str]
    logs: str
    ranks: int
    nodes: int
    address: str
    port: int
    folder: str | None = None

    @property
    def each(self) -> int:
        """Ranks a node."""
        return self.ranks // self.nodes

    def rank(self, *options: str) -> list[str]:
        """Return the words for one rank, from the name of its module on."""
        return ["launch.rank", *options, "--quiet", self.logs, *self.command]
