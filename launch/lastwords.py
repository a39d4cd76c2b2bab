"""What logs say of an end."""

import re
from pathlib import Path

PATTERNS = {  # best first, and which of several lines tells most
    r"\s+traceback : (Signal .*)": 0,  # torchrun: of the rank that was killed; the others only lost it
    r"(?:(?!srun)[\w.-]+: )?error: (?!\*\*\*)(.*)": -1,  # with stars slurmstepd tells of who was cancelled
    r"([\w.]*(?:Error|Exception)\b.*)": -1,
    r"srun: error: (.*)": 0,
}
TERMINATED = re.compile(r"srun: error: \S+: tasks? \S+: (Terminated|Exited with exit code 143)")


class LastWords:
    """What logs say from now on.

    Args:
        logs: Files; they may not be there yet.
    """

    def __init__(self, logs: list[Path]):
        self._from = {log: log.stat().st_size if log.exists() else 0 for log in logs}

    def error(self) -> str:
        """Return the line that tells best why the ranks ended."""
        lines = self._lines()
        for pattern, place in PATTERNS.items():
            if found := [match[1] for line in lines if (match := re.match(pattern, line))]:
                return found[place]
        return "no reason was given"

    def was_terminated(self) -> bool:
        """Tell whether a SIGTERM from outside ended the ranks, by the first to end: srun sends one to the others."""
        told = [line for line in self._lines() if line.startswith("srun: error: ")]
        return bool(told) and TERMINATED.match(told[0]) is not None

    def _lines(self) -> list[str]:
        lines = []
        for log, start in self._from.items():
            if log.exists():
                with open(log, encoding="utf-8", errors="replace") as file:
                    file.seek(start)
                    lines += file.read().splitlines()
        return lines
