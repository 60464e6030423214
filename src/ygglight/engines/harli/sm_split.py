"""Disjoint sets of SMs by CUDA green contexts, all from one split of the device (brief A.6).

Two calls of ``torch.cuda.green_contexts.GreenContext.create`` each split the device for themselves, and their sets
overlap (pytorch issue 195378). Here the driver splits once, in equal groups, and every context is made of some of those
groups: contexts that share no group share no SM. It is spoken to through ``cuda.bindings``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from ygglight.engines.harli.executors import Unavailable

GROUP_SMS = 16
"""SMs of a group. Hopper asks for multiples of 8; MuxWise found 16 fine enough."""


class SMSplit:
    """The groups of one split, and contexts made of them.

    Args:
        device: CUDA, with an index. group_sms: of a group, rounded up by the driver to what the device can do.
        driver: for tests; default ``cuda.bindings.driver``.

    Raises:
        Unavailable: no bindings, a driver or device without green contexts, or too few SMs for two groups.
    """

    def __init__(self, device: torch.device, group_sms: int = GROUP_SMS, driver: Any = None) -> None:
        self.device, self._contexts = device, list[Any]()
        if driver is None:
            try:
                driver = importlib.import_module("cuda.bindings.driver")
            except ImportError as error:
                raise Unavailable(f"green contexts need cuda-bindings ({error}): pip install cuda-bindings") from None
        self._driver = driver
        for name in (
            "cuDeviceGetDevResource",
            "cuDevSmResourceSplitByCount",
            "cuGreenCtxCreate",
            "cuGreenCtxStreamCreate",
        ):
            if not hasattr(driver, name):
                raise Unavailable(f"cuda-bindings has no {name}: green contexts need cuda-bindings 12.5 or newer")
        self._call("cuInit", 0)
        (self._ordinal,) = self._call("cuDeviceGet", device.index or 0)
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        (whole,) = self._call("cuDeviceGetDevResource", self._ordinal, kind)
        self.sms = int(whole.sm.smCount)
        """Of the device."""
        wanted = self.sms // group_sms
        if wanted < 2:
            raise Unavailable(f"{self.sms} SMs cannot be split in two groups of {group_sms}")
        groups, count, rest = self._call("cuDevSmResourceSplitByCount", wanted, whole, 0, group_sms)
        self._groups = [[group] for group in list(groups)[: int(count)]]
        if len(self._groups) < 2:
            raise Unavailable(f"the driver made {len(self._groups)} group of {self.sms} SMs, and two are needed")
        if int(rest.sm.smCount) > 0:  # too few for a context of their own (132 = 8 * 16 + 4): with the last group
            self._groups[-1].append(rest)
        self.sizes = [sum(int(part.sm.smCount) for part in group) for group in self._groups]
        """SMs of each group."""

    def stream(self, groups: Sequence[int], priority: int = 0) -> torch.cuda.ExternalStream:
        """A stream whose kernels run on these groups only. It lives until :meth:`close`.

        Args:
            groups: their numbers. priority: as of CUDA streams, lower is more urgent.
        """
        chosen = [part for group in groups for part in self._groups[group]]
        (description,) = self._call("cuDevResourceGenerateDesc", chosen, len(chosen))
        flags = self._driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        (context,) = self._call("cuGreenCtxCreate", description, self._ordinal, flags)
        self._contexts.append(context)
        no_default = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        (stream,) = self._call("cuGreenCtxStreamCreate", context, no_default, priority)
        return torch.cuda.ExternalStream(int(stream), device=self.device)

    def close(self) -> None:
        """Destroy the contexts, and their streams with them; the caller has waited for the work on them."""
        while self._contexts:
            self._call("cuGreenCtxDestroy", self._contexts.pop())

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        status, *values = getattr(self._driver, name)(*arguments)
        if int(status):
            raise Unavailable(f"{name} failed on {self.device}: {getattr(status, 'name', status)}")
        return tuple(values)
