"""What a copy of an expert takes on this link, while the machine is at its ordinary work."""

from __future__ import annotations

KEPT = 0.9  # of what was known, a copy


class Speed:
    """``seconds = tau + bytes / bandwidth``, fitted to the copies as they come, older ones weighing less.

    Where all copies are of one size the two cannot be told apart: then ``tau`` is what is known beforehand, and the
    bandwidth takes the rest.

    Args:
        bandwidth: Bytes a second to begin with; the paper's platform reaches about 12 GB/s.
        tau: Seconds that a copy takes beside its bytes, as far as known.
    """

    def __init__(self, bandwidth: float = 12e9, tau: float = 0.0) -> None:
        self.bandwidth, self.tau = bandwidth, tau
        self.copies = 0
        self._known_tau = tau
        self._bytes = self._seconds = self._spread = self._joint = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """One copy is done.

        Args:
            nbytes: Its size. seconds: From its start, or the end of the one before it, to its end.
        """
        share = max(1 - KEPT, 1 / (self.copies + 1))  # a plain mean at first
        self.copies += 1
        off_bytes, off_seconds = nbytes - self._bytes, seconds - self._seconds
        self._bytes += share * off_bytes
        self._seconds += share * off_seconds
        self._spread = (1 - share) * (self._spread + share * off_bytes**2)
        self._joint = (1 - share) * (self._joint + share * off_bytes * off_seconds)
        self._fit()

    def seconds(self, nbytes: float, copies: float = 1.0) -> float:
        """What copies would take, one after the other.

        Args:
            nbytes: Of all of them. copies: How many.
        """
        return copies * self.tau + nbytes / self.bandwidth

    def _fit(self) -> None:
        slope = self._joint / self._spread if self._spread > (0.05 * self._bytes) ** 2 else 0.0
        if slope > 0:
            self.tau = max(0.0, self._seconds - slope * self._bytes)
        else:
            self.tau = min(self._known_tau, self._seconds / 2)
        self.bandwidth = self._bytes / max(self._seconds - self.tau, 1e-9)
