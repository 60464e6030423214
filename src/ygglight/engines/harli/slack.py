"""How long the next step may take, from what each request has in the bank (brief A.5; our design)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass
class Account:
    """Of one running request: when its first and its latest token came (seconds), and how many came after the first."""

    first: float
    latest: float
    tokens: int = 0


class Slack:
    """Time per output token (TPOT) is a mean, so a request whose tokens came early may wait longer for the next.

    With ``k`` tokens after the first, out over ``e`` seconds, the next step may take ``target (k + 1) - e``: then the
    mean is kept whenever the request ends. A good mean hides pauses, so no gap may be longer than a second target.
    Decode thread only; times come in from the caller's clock.

    Args:
        tpot_slo: seconds an output token, as a mean over each request. max_gap: longest time between two tokens in
            seconds. margin: share of the target held back for what is not predicted (sampling, the host), 0..1.

    Raises:
        ValueError: a target that cannot be.
    """

    def __init__(self, tpot_slo: float, max_gap: float, margin: float = 0.05) -> None:
        if not 0 < tpot_slo <= max_gap:
            raise ValueError(
                f"tpot_slo={tpot_slo} s and max_gap={max_gap} s: the target is above 0, and the longest gap no shorter"
            )
        if not 0 <= margin < 1:
            raise ValueError(f"margin={margin}: a share of the target, from 0 to below 1")
        self.tpot_slo, self.max_gap, self.margin = tpot_slo, max_gap, margin
        self._accounts: dict[Hashable, Account] = {}

    def token(self, request: Hashable, now: float) -> None:
        """A request got a token; its first opens the account.

        Args:
            request: its id. now: seconds.
        """
        account = self._accounts.get(request)
        if account is None:
            self._accounts[request] = Account(now, now)
        else:
            account.tokens += 1
            account.latest = now

    def finish(self, request: Hashable) -> None:
        """A request ended, in whatever way; one that never got a token has no account, and that is fine."""
        self._accounts.pop(request, None)

    def allowance(self, now: float) -> float:
        """Seconds from now until the next tokens have to be out; negative when it is too late already.

        The least over all running requests. While nobody runs it is the longest gap, so that the first token of those
        who wait does not wait for ever.

        Args:
            now: seconds.
        """
        share = 1 - self.margin
        return min(
            (
                min(
                    share * self.tpot_slo * (account.tokens + 1) - (now - account.first),
                    share * self.max_gap - (now - account.latest),
                )
                for account in self._accounts.values()
            ),
            default=share * self.max_gap,
        )

    def __len__(self) -> int:
        return len(self._accounts)
