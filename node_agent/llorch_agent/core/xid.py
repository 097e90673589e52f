"""Which XID events of the NVIDIA driver mean that the GPU is broken."""

from __future__ import annotations

APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 109})
"""Errors of a program, not of the GPU: NVIDIA's device plugin and DRA driver ignore the same ones.

13 graphics engine exception, 31 memory page fault, 43 stopped processing, 45 preemptive cleanup, 68 video processor
exception, 109 context switch time-out.
"""


def is_failure(xid: int) -> bool:
    """True where the GPU, not a program on it, is at fault. XIDs that nobody has heard of count: they are rare and never good."""
    return xid not in APPLICATION_XIDS
