"""GPU error codes (Xid) as data: what each means and what to do, as NVIDIA says.

Source: NVIDIA, "Xid Errors", catalog for Ampere and newer, https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html:
its column "Resolution Bucket (Immediate Action)" decides. IGNORE -> watch; RESTART_APP -> application; RESET_GPU ->
reset; RESTART_BM (restart the machine) -> replace, as no process can do that for itself. Where the bucket is a workflow,
the text beside it decides: 45 is the echo of an application's end, 48 and 74 need "a GPU reset or node reboot", and 74 may
mean the other end of the link, so the whole node is drained; 54 (auxiliary power not connected, CHECK_MECHANICALS) needs
hands. Codes that are not in use are left out, and so are those of video engines alone, which training does not touch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class XidRemedy(StrEnum):
    """What a code asks for."""

    WATCH = "watch"
    """Nothing: it is information, or the echo of something else."""
    APPLICATION = "application"
    """An error of the program's, most likely: restart it; the GPU is healthy."""
    RESET_GPU = "reset GPU"
    DRAIN = "drain node"
    REPLACE = "replace node"


@dataclass(frozen=True, slots=True)
class XidMeaning:
    """One code."""

    meaning: str
    remedy: XidRemedy


def _table(remedy: XidRemedy, meanings: dict[int, str]) -> dict[int, XidMeaning]:
    return {code: XidMeaning(meaning, remedy) for code, meaning in meanings.items()}


_COPY_ENGINES = (39, 40, 41, 70, 71, 72, 75, 76, 77, 85, *range(126, 136))

XIDS: dict[int, XidMeaning] = {
    **_table(XidRemedy.APPLICATION, {
        8: "GPU stopped processing (idle timeout)",
        11: "invalid or corrupted push buffer stream",
        13: "graphics engine exception: an access out of bounds, or an illegal instruction",
        25: "invalid or illegal push buffer stream",
        31: "GPU memory page fault: an illegal address",
        32: "invalid or corrupted push buffer stream",
        **dict.fromkeys(_COPY_ENGINES, "copy engine exception"),
        69: "graphics engine class error",
        80: "corrupted data sent to the GPU",
        94: "contained memory error: only this application is hit; reset the GPU when convenient",
    }),
    **_table(XidRemedy.WATCH, {
        14: "fake error, injected from user space",
        37: "driver firmware error",
        38: "driver firmware error (watchdog)",
        43: "GPU stopped processing: a fault of the application's, the GPU is healthy",
        44: "graphics engine fault during context switch",
        45: "preemptive cleanup after another error, or after the application's end",
        63: "GPU memory row remapped (or page retired): takes effect at the next reset",
        66: "illegal access by driver",
        67: "illegal access by driver",
        92: "high rate of single-bit ECC errors",
        93: "InfoROM wear limit",
        106: "test message",
        107: "test message",
        121: "corrected errors on the link to the CPU (C2C)",
        137: "NVLink privilege error: an illegal peer-to-peer access",
        141: "CUDA fast path error",
        154: "recovery action changed: sums up what other codes ask for",
        157: "resource retirement failed: may come again",
        160: "memory channel retired",
        161: "memory channel could not be retired",
    }),
    **_table(XidRemedy.RESET_GPU, {
        46: "GPU stopped processing (timeout)",
        48: "double-bit ECC error, uncorrectable",
        62: "internal micro-controller halt",
        64: "GPU memory row could not be remapped (or page not retired)",
        95: "uncontained memory error: every application on the GPU is hit",
        109: "context switch timeout",
        110: "security fault: cold reset; hardware if it comes again",
        119: "timeout of a call to the GPU's system processor (GSP)",
        120: "error of the GPU's system processor (GSP)",
        136: "NVLink training failed",
        140: "unrecovered ECC error",
        143: "GPU initialisation error",
        155: "NVLink down, as software defined",
        156: "resource retired: takes effect at the reset",
        158: "GPU fatal timeout",
    }),
    **_table(XidRemedy.DRAIN, {
        74: "NVLink error: of the link, or of the device at its other end",
        **dict.fromkeys(range(144, 151), "NVLink 5 error"),
        151: "key rotation error: the virtual machine must be restarted",
    }),
    **_table(XidRemedy.REPLACE, {
        54: "auxiliary power is not connected to the GPU board",
        79: "GPU has fallen off the bus",
    }),
}  # fmt: skip
