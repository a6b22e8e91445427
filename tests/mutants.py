"""Does each clause's test notice when the clause is broken?

A mutant is a change of one line of the sources, which breaks one clause. For each row of `MUTANTS`
the change is made in a copy of the checkout, and its test must fail there, interpreted. Prints
clause, test, mutant and whether it was killed; exits with 1 if one survives, or if a snippet is not
found exactly once. `--write-docs` writes docs/conformance.md from it.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs/conformance.md"
CONFORMANCE = "tests/conformance"
AT_ONCE = 2
PATIENCE = 90  # seconds for one test

BASE = "src/virtio/transport/base.py"
FRONT = "src/virtio/transport/vhost_user.py"
SESSION = "src/virtio/transport/session.py"
WIRE = "src/virtio/wire/vhost_user.py"
SPLIT = "src/virtio/ring/split.py"
PACKED = "src/virtio/ring/packed.py"
REQUESTS = "src/virtio/ring/requests.py"
FILLED = "src/virtio/ring/slots.py"
LAYOUT = "src/virtio/ring/layout.py"
DEVICE = "src/virtio/device/base.py"
BLK = "src/virtio/device/blk.py"
SCSI = "src/virtio/device/scsi.py"
SCSI_DISK = "src/virtio/device/scsi_disk.py"
SCSI_ERRORS = "src/virtio/device/scsi_errors.py"
DIALOGUE = "src/virtio/device/dialogue.py"
EVENT_QUEUE = "src/virtio/device/events.py"
RECOVERY = "src/virtio/device/recovery.py"
SCSI_WIRE = "src/virtio/wire/virtio_scsi.py"
BDEV = "src/virtio_bdev/bdev.py"
MODERN = "src/virtio/transport/pci.py"
LEGACY = "src/virtio/transport/pci_legacy.py"
PCI_BASE = "src/virtio/transport/pci_base.py"
PCI_WIRE = "src/virtio/wire/pci.py"
BELL = "src/virtio/ring/doorbell.py"

INIT, RING, PACKED_RING, USER, CLEAN, BLOCK, UNITS, RESET = (
    f"{CONFORMANCE}/test_{name}.py"
    for name in ("init", "split_ring", "packed_ring", "vhost_user", "cleanup", "blk", "scsi", "reset")
)
EXPLAIN = "tests/device/test_explain.py"
PCI, LEGACY_PCI, PCI_SPACE, BELL_TEST, SLOTS = (
    "tests/transport/test_pci.py",
    "tests/transport/test_pci_legacy.py",
    "tests/wire/test_pci.py",
    "tests/ring/test_doorbell.py",
    "tests/ring/test_requests.py",
)


class Mutant(NamedTuple):
    """Replace `snippet`, which occurs once in `path`; `test` must fail then."""

    clause: str
    test: str
    path: str
    snippet: str
    replacement: str


class Clause(NamedTuple):
    """A clause of the specification, and why it has no mutant, where it has none."""

    id: str
    level: str
    text: str
    why_none: str = ""


_NEVER = "never negotiated"
_REVIEW = "no test can see it: review of the compiled code; stress in "
_DISK = "proven by its test; a clause of the device, not of the ring"

CLAUSES = [
    Clause("INI-1", "M", "the eight steps of the initialization, in order"),
    Clause("INI-2", "M", "no write to the configuration space during negotiation"),
    Clause("INI-3", "M", "no new feature after FEATURES_OK"),
    Clause("INI-4", "M", "stop when FEATURES_OK does not stay"),
    Clause("INI-5", "M", "no notification before DRIVER_OK"),
    Clause("STA-1", "M", "status bits are added, and cleared by a reset only"),
    Clause("STA-2", "M", "after FAILED, reset before a new start"),
    Clause("STA-3", "S", "with DEVICE_NEEDS_RESET no completion is counted on: the device is given up"),
    Clause("FEA-1", "M", "accept no bit that was not offered"),
    Clause("FEA-2", "M", "accept no bit without those it needs", "no bit accepted here needs another"),
    Clause("FEA-3", "M", "ignore unknown, reserved and other devices' bits"),
    Clause("FEA-4", "M", "a needed feature is missing: FAILED, and stop"),
    Clause("FEA-5", "M", "an unknown bit is no reason to fail"),
    Clause("RFB-1", "M", "accept VERSION_1"),
    Clause("RFB-2", "M", "ACCESS_PLATFORM: an IOMMU is set up, or it is not accepted"),
    Clause("RFB-3", "S", "accept ORDER_PLATFORM and the like"),
    Clause("RFB-4", "M", "ORDER_PLATFORM: barriers of the hardware", _REVIEW + "SPL-19's test"),
    Clause("RFB-5", "M", "SR_IOV is not negotiated without its capability"),
    Clause("RST-1", "S", "a reset is over when the status reads 0"),
    Clause("CFG-1", "M", "no atomicity across 32 bits or several fields"),
    Clause("CFG-2", "M", "no optional field without its feature"),
    Clause("CFG-3", "M", "a longer configuration space is accepted"),
    Clause("VQR-1", "M", "a queue reset is verified"),
    Clause("VQR-2", "M", "a queue is enabled again as at first"),
    Clause("CLN-1", "M", "buffers that the device has are not altered"),
    Clause("CLN-2", "M", "buffers are taken back from a stopped queue only"),
    Clause("SUS-1", "S", "SUSPEND only if negotiated", f"SUSPEND is {_NEVER}"),
    Clause("SUS-2", "M", "after SUSPEND: no buffers, no kicks", f"SUSPEND is {_NEVER}"),
    Clause("SPL-1", "M", "alignment of the three areas"),
    Clause("SPL-2", "M", "writable descriptors after readable ones"),
    Clause("SPL-3", "S", "no excessive number of descriptors", "a SHOULD, and no bound is given"),
    Clause("SPL-4", "M", "no loop, and at most 2^32 bytes in a chain"),
    Clause("SPL-5", "M", "IN_ORDER: descriptors in sequence"),
    Clause("SPL-6", "M", "INDIRECT only if negotiated, and not nested"),
    Clause("SPL-7", "M", "no chain longer than the queue"),
    Clause("SPL-8", "M", "not INDIRECT and NEXT together"),
    Clause("SPL-9", "M", "IN_ORDER: indirect tables in sequence"),
    Clause("SPL-10", "M", "the available index never goes back"),
    Clause("SPL-11", "M", "without EVENT_IDX avail.flags is 0 or 1"),
    Clause("SPL-12", "M", "with EVENT_IDX avail.flags is 0"),
    Clause("SPL-13", "M", "spurious notifications are survived"),
    Clause("SPL-14", "M", "nothing is believed that the device did not write"),
    Clause("SPL-15", "M", "used.flags is 0 at first"),
    Clause("SPL-16", "M", "without EVENT_IDX: notify unless flags say no"),
    Clause("SPL-17", "M", "with EVENT_IDX: notify when the index passes avail_event"),
    Clause("SPL-18", "M", "a barrier before the index", _REVIEW + "test_a_sleeper_is_always_woken"),
    Clause(
        "SPL-19",
        "M",
        "a full barrier before flags or avail_event",
        _REVIEW + "test_a_sleeper_is_always_woken",
    ),
    Clause("PKD-1", "M", "alignment of ring and areas"),
    Clause("PKD-2", "M", "a descriptor is let alone until it is seen to be used"),
    Clause("PKD-3", "M", "next_off and next_wrap in a notification", f"NOTIFICATION_DATA is {_NEVER}"),
    Clause("PKD-4", "M", "no list longer than the ring"),
    Clause("PKD-5", "M", "writable descriptors after readable ones"),
    Clause("PKD-6", "M", "room for a whole list before its first descriptor"),
    Clause("PKD-7", "M", "a list's first descriptor is made available last"),
    Clause("PKD-8", "M", "INDIRECT only if negotiated; in a table WRITE alone"),
    Clause("PKD-9", "M", "no table longer than the ring"),
    Clause("PKD-10", "M", "INDIRECT is no part of a list"),
    Clause("PKD-11", "M", "a barrier before the flags", _REVIEW + "PKD-7's tests"),
    Clause("PKD-12", "M", "event suppression: DISABLE, ENABLE, a descriptor and its wrap counter"),
    Clause("VHU-1", "M", "the header of every message"),
    Clause("VHU-2", "M", "descriptors with the messages that name them, and no others"),
    Clause("VHU-3", "M", "a wrong reply ends the connection"),
    Clause("VHU-4", "M", "replies are awaited"),
    Clause("VHU-5", "M", "every extension by its protocol feature"),
    Clause("VHU-6", "M", "SET_OWNER once, at the start; RESET_OWNER never"),
    Clause("VHU-7", "M", "protocol features only if bit 30 was offered"),
    Clause("VHU-8", "M", "bit 30 is accepted, and every ring enabled"),
    Clause("VHU-9", "M", "rings are stopped before their memory goes"),
    Clause("VHU-10", "M", "GET_VRING_BASE with num 0; bases given back"),
    Clause("VHU-11", "M", "GET_QUEUE_NUM only with MQ; no more queues than there are"),
    Clause("VHU-12", "M", "SET_MEM_TABLE: regions and descriptors match"),
    Clause("VHU-13", "M", "rings by user address, buffers by guest address"),
    Clause("VHU-14", "M", "memory slots: only with their feature, and no more than there are"),
    Clause("VHU-15", "M", "KICK, CALL and ERR: index, and bit 8 without a descriptor"),
    Clause("VHU-16", "M", "GET_CONFIG: a size, flags 0, a reply of that size"),
    Clause("VHU-17", "M", "the channel back: only with BACKEND_REQ, and then served"),
    Clause("VHU-18", "M", "answers on the channel back: when asked for, else none"),
    Clause("VHU-19", "M", "REPLY_ACK: only if negotiated; non-zero is a failure"),
    Clause("VHU-20", "M", "in-flight memory"),
    Clause("VHU-21", "M", "in-band notifications"),
    Clause("VHU-22", "M", "RESET_DEVICE only with its feature"),
    Clause("VHU-23", "M", "status only with STATUS"),
    Clause("VHU-24", "M", "memory is removed when all rings have stopped"),
    Clause("VHU-25", "M", "nothing of migration is negotiated"),
    Clause("VHU-26", "M", "nothing of device state is negotiated"),
    Clause("VHU-27", "M", "either side may listen", "we connect; the target listens"),
    Clause("PCI-1", "M", "vendor 1af4, devices 1040 to 107f, and the transitional ones"),
    Clause("PCI-2", "M", "any revision, any subsystem", "nothing reads them"),
    Clause("PCI-3", "M", "each field by its own width, 64 bits as two of 32"),
    Clause("PCI-4", "M", "capabilities of reserved types are passed over"),
    Clause("PCI-5", "S", "the first usable structure of a type"),
    Clause("PCI-6", "M", "longer capabilities are accepted"),
    Clause("PCI-7", "M", "capabilities with a reserved BAR are passed over"),
    Clause("PCI-8", "M", "structures of any length are handled"),
    Clause("PCI-9", "M", "capabilities are not written, PCI_CFG's registers excepted"),
    Clause("PCI-10", "M", "registers for reading are not written"),
    Clause("PCI-11", "M", "the size of a queue is a power of two"),
    Clause("PCI-12", "M", "queue_enable after all else of a queue"),
    Clause("PCI-13", "M", "after a reset, wait until the status reads 0"),
    Clause("PCI-14", "M", "queue_enable is never written 0"),
    Clause("PCI-15", "M", "a queue reset is over when queue_reset reads 0"),
    Clause("PCI-16", "M", "the administration queues", f"ADMIN_VQ is {_NEVER}"),
    Clause("PCI-17", "S", "with MSI-X the ISR status is left alone"),
    Clause("PCI-18", "M", "vendor data: look at the vendor first", "vendor data is not read"),
    Clause("PCI-19", "M", "PCI_CFG: aligned, and within a structure"),
    Clause("PCI-20", "M", "vectors of the table, read back, and done without"),
    Clause("PCI-21", "M", "notifications of 16 bits"),
    Clause("PCI-22", "M", "the queue's index, or what queue_notif_config_data says"),
    Clause("PCI-23", "M", "one interrupt may be for configuration and queues"),
    Clause("BLK-1", "S", "no request that was not negotiated"),
    Clause("BLK-2", "S", "FLUSH without CONFIG_WCE: a write-back cache", _DISK),
    Clause("BLK-3", "M", "`writeback` is not read before FEATURES_OK"),
    Clause("BLK-4", "M", "ZONED only by those who know zones", f"ZONED is {_NEVER}: see FEA-3"),
    Clause("BLK-5", "S", "the capacity is looked at again when it changed"),
    Clause("BLK-6", "M", "nothing beyond the capacity"),
    Clause("BLK-7", "S", "RO is accepted, and then nothing is written"),
    Clause("BLK-8", "M", "a flush is of sector 0"),
    Clause("BLK-9", "M", "data is a multiple of 512 bytes"),
    Clause("BLK-10", "M", "discard and write zeroes: whole segments"),
    Clause("BLK-11", "M", "GET_ID has 20 bytes"),
    Clause("BLK-12", "M", "no more segments than the device takes", "one segment a request"),
    Clause("BLK-13", "M", "writeback=0: flush first", "`writeback` is never written"),
    Clause("BLK-14", "M", "`unmap` is 0 in a discard"),
    Clause("BLK-15", "M", "an error says nothing of the other segments", "one segment a request"),
    Clause("BLK-16", "M", "the zoned operations", f"ZONED is {_NEVER}"),
    Clause("BLK-17", "-", "size_max, seg_max, limits of discard and write zeroes"),
    Clause("SCS-1", "M", "nothing is written to the configuration but sense_size and cdb_size"),
    Clause("SCS-2", "M", "no more commands to a unit than cmd_per_lun, over all queues"),
    Clause("SCS-3", "S", "task_attr, prio and crn are 0"),
    Clause("SCS-4", "S", "TARGET_FAILURE is final"),
    Clause("SCS-5", "S", "the event queue always has buffers"),
    Clause("SCS-6", "M", "event buffers: writable, and as large as events"),
    Clause("SCS-7", "S", "missed events: look at everything again"),
    Clause("SCS-8", "S", "an event of LUN 0 means its target"),
    Clause("SCS-9", "-", "the eight bytes of an address, and both forms of those that come"),
    Clause("SCS-10", "-", "the layout follows sense_size and cdb_size"),
    Clause("SCS-11", "-", "seg_max, max_sectors, max_target and max_lun are kept to"),
]

MUTANTS = [
    # Initialization
    Mutant(
        "INI-1",
        f"{INIT}::test_the_eight_steps_are_done_in_order",
        BASE,
        "    transport.reset()\n",
        "    pass\n",
    ),
    Mutant(
        "INI-1",
        f"{INIT}::test_the_eight_steps_are_done_in_order",
        BASE,
        "    status |= Status.FEATURES_OK\n",
        "    status |= Status.FEATURES_OK | Status.DRIVER_OK\n",
    ),
    Mutant(
        "INI-2",
        f"{INIT}::test_the_configuration_space_is_never_written_while_features_are_negotiated",
        FRONT,
        "        self._features = features | self._offered & PROTOCOL_FEATURES\n",
        "        self._features = features | self._offered & PROTOCOL_FEATURES\n"
        "        self._session.tell(Request.SET_CONFIG, ConfigSpace(0, 1).encode())\n",
    ),
    Mutant(
        "INI-3",
        f"{INIT}::test_features_are_accepted_once",
        FRONT,
        "        self.set_status(self._status | Status.DRIVER_OK)\n",
        "        self.accept(self._features)\n        self.set_status(self._status | Status.DRIVER_OK)\n",
    ),
    Mutant(
        "INI-4",
        f"{INIT}::test_a_device_that_takes_features_ok_back_is_given_up_as_failed",
        BASE,
        "    if not transport.status() & Status.FEATURES_OK:\n",
        "    if not transport.status():\n",
    ),
    Mutant(
        "INI-5",
        f"{INIT}::test_no_ring_is_kicked_before_driver_ok",
        FRONT,
        "        return QueuePort(doorbell, call)\n",
        "        os.eventfd_write(kick, 1)\n        return QueuePort(doorbell, call)\n",
    ),
    Mutant(
        "STA-1",
        f"{INIT}::test_each_status_written_has_all_bits_of_the_one_before",
        BASE,
        "    status |= Status.DRIVER\n",
        "    status = Status.DRIVER\n",
    ),
    Mutant(
        "STA-2",
        f"{INIT}::test_after_a_failure_the_device_is_reset_before_it_is_initialized_again",
        BASE,
        "    transport.reset()\n",
        "    pass\n",
    ),
    Mutant(
        "FEA-1",
        f"{INIT}::test_no_feature_is_accepted_that_was_not_offered",
        BASE,
        "    accepted = offered & (wanted | own)\n",
        "    accepted = wanted | own\n",
    ),
    Mutant(
        "FEA-3",
        f"{INIT}::test_of_all_bits_only_those_that_make_sense_here_are_accepted",
        BASE,
        "    accepted = offered & (wanted | own)\n",
        "    accepted = offered\n",
    ),
    Mutant(
        "FEA-4",
        f"{INIT}::test_a_device_without_version_1_is_given_up_as_failed",
        BASE,
        "    if missing:\n",
        "    if False:\n",
    ),
    Mutant(
        "FEA-5",
        f"{INIT}::test_an_unknown_bit_is_no_reason_to_fail",
        BASE,
        "    if missing:\n",
        "    if missing or offered >> 43:\n",
    ),
    Mutant(
        "RFB-1",
        f"{INIT}::test_of_all_bits_only_those_that_make_sense_here_are_accepted",
        FRONT,
        "    required = int(Feature.VERSION_1)\n",
        "    required = 0\n",
    ),
    *(
        Mutant(
            clause,
            f"{INIT}::test_of_all_bits_only_those_that_make_sense_here_are_accepted",
            BASE,
            "    accepted = offered & (wanted | own)\n",
            f"    accepted = offered & (wanted | own | 1 << {bit})\n",
        )
        for clause, bit in [("RFB-2", 33), ("RFB-5", 37), ("SPL-5", 35), ("SPL-9", 35)]
    ),
    Mutant(
        "CFG-1",
        f"{INIT}::test_the_configuration_is_read_in_one_message",
        BLK,
        "self.transport.read_config(config_span(own), config_accesses(own))",
        "[self.transport.read_config(n, []) for n in (8, 60)][1]",
    ),
    Mutant(
        "CFG-2",
        f"{INIT}::test_fields_of_features_that_are_not_offered_are_not_believed",
        BLK,
        "self.transport.read_config(config_span(own), config_accesses(own))",
        "self.transport.read_config(60, []); own = 0x7FFF",
    ),
    # Cleaning up
    Mutant(
        "CLN-1",
        f"{CLEAN}::test_a_late_answer_lands_in_nobody_elses_memory",
        REQUESTS,
        "                self._orphan(slot)\n                self._kept[slot] = kept\n",
        "                self._release(slot)\n",
    ),
    Mutant(
        "CLN-1",
        f"{CLEAN}::test_descriptors_of_a_request_that_timed_out_stay_as_they_are",
        REQUESTS,
        "                self._orphan(slot)\n                if kept is not None:\n",
        "                self._release(slot)\n                if kept is not None:\n",
    ),
    Mutant(
        "CLN-2",
        f"{CLEAN}::test_rings_are_stopped_before_the_connection_ends",
        FRONT,
        "                    self.stop()\n",
        "                    pass\n",
    ),
    Mutant(
        "CLN-2",
        f"{RESET}::test_what_the_device_had_is_sent_again_and_completes_once",
        SPLIT,
        "        fill(self._mem, self._avail, 0, RING + 2 * self.size + event)\n",
        "        fill(self._mem, self._avail, 0, len(self._view) - self._avail)\n",
    ),
    # The split ring
    Mutant(
        "SPL-1",
        f"{RING}::test_the_three_areas_are_aligned_and_apart",
        SPLIT,
        "    used = up(available + RING + 2 * size + 2, align)\n",
        "    used = up(available + RING + 2 * size + 2, align) + 2\n",
    ),
    Mutant(
        "SPL-1",
        f"{SLOTS}::test_a_request_on_a_small_ring_is_one_cache_line_each_way",
        LAYOUT,
        "if head + layout.request > heads.stop or",
        "if head + layout.request > 2 * heads.stop or",
    ),
    Mutant(
        "SPL-1",
        f"{SLOTS}::test_as_many_in_flight_as_a_small_ring_has_keep_apart_many_times_round",
        SPLIT,
        "_left(used, used + RING + ELEM * size + EVENT)",
        "_left(used, used + RING + ELEM * size)",
    ),
    Mutant(
        "SPL-2",
        f"{RING}::test_every_chain_is_well_formed",
        FILLED,
        "        if self._response_first and template.direction != TO_DEVICE:\n",
        "        if template.direction == TO_DEVICE:\n",
    ),
    Mutant(
        "SPL-4",
        f"{RING}::test_every_chain_is_well_formed",
        FILLED,
        "first + index + 1 if flags & NEXT else 0",
        "first + index if flags & NEXT else 0",
    ),
    Mutant(
        "SPL-6",
        f"{RING}::test_every_chain_is_well_formed",
        DEVICE,
        "        return bool(self.features & Feature.INDIRECT_DESC)\n",
        "        return True\n",
    ),
    Mutant(
        "SPL-7",
        f"{RING}::test_no_chain_is_longer_than_the_queue",
        DEVICE,
        "        self.segments = max(1, min(segments, useful, self.queue_size - 2))\n",
        "        self.segments = max(1, min(segments, useful))\n",
    ),
    Mutant(
        "SPL-8",
        f"{RING}::test_every_chain_is_well_formed",
        FILLED,
        "16 * total, INDIRECT, 0)",
        "16 * total, INDIRECT | NEXT, 0)",
    ),
    Mutant(
        "SPL-10",
        f"{RING}::test_the_available_index_wraps_and_never_goes_back",
        SPLIT,
        "        self._avail_idx = (self._avail_idx + 1) & 0xFFFF\n",
        "        self._avail_idx = (self._avail_idx + 1) & 0x7FFF\n",
    ),
    Mutant(
        "SPL-11",
        f"{RING}::test_avail_flags_are_0_or_1_without_event_idx_and_0_with_it",
        SPLIT,
        "            store_u16(self._mem, self._avail, NO_INTERRUPT)\n",
        "            store_u16(self._mem, self._avail, 3)\n",
    ),
    Mutant(
        "SPL-12",
        f"{RING}::test_avail_flags_are_0_or_1_without_event_idx_and_0_with_it",
        SPLIT,
        "self._used_idx - 1 & 0xFFFF)\n",
        "self._used_idx - 1 & 0xFFFF)\n            store_u16(self._mem, self._avail, NO_INTERRUPT)\n",
    ),
    Mutant(
        "SPL-13",
        f"{RING}::test_calls_without_a_used_buffer_are_survived",
        SPLIT,
        "        if pending == 0:\n",
        "        if pending < 0:\n",
    ),
    Mutant(
        "SPL-14",
        f"{RING}::test_a_request_that_comes_back_without_a_status_did_not_succeed",
        FILLED,
        "            store_u8(self._region, self._response(slot) + self._result_at, 0xFF)\n",
        "            pass\n",
    ),
    Mutant(
        "SPL-14",
        f"{RING}::test_a_used_id_that_the_device_does_not_have_breaks_it",
        SPLIT,
        "        if head >= self.size or not load_u8(self._given, head):\n",
        "        if head >= self.size:\n",
    ),
    Mutant(
        "SPL-14",
        f"{RING}::test_a_used_index_that_runs_ahead_is_refused_before_its_first_entry",
        SPLIT,
        "        if pending > self.outstanding():\n            return FAULTY\n",
        "        if pending < 0:\n            return FAULTY\n",
    ),
    Mutant(
        "SPL-15",
        f"{RING}::test_a_new_ring_is_all_zeros_whatever_the_memory_held",
        SPLIT,
        "        fill(self._mem, 0, 0, end)",
        "        fill(self._mem, 0, 0, self._used)",
    ),
    Mutant(
        "SPL-16",
        f"{RING}::test_a_sleeper_is_always_woken",
        SPLIT,
        "        return not load_u16(self._mem, self._used) & NO_NOTIFY\n",
        "        return False\n",
    ),
    Mutant(
        "SPL-16",
        f"{RING}::test_a_device_that_wants_no_kicks_gets_none",
        SPLIT,
        "        return not load_u16(self._mem, self._used) & NO_NOTIFY\n",
        "        return True\n",
    ),
    Mutant(
        "SPL-17",
        f"{RING}::test_whether_to_kick_agrees_with_counters_that_never_wrap",
        SPLIT,
        "            return passed < ((self._avail_idx - old) & 0xFFFF)\n",
        "            return self._avail_idx >= event + 1\n",
    ),
    Mutant(
        "SPL-17",
        f"{RING}::test_the_driver_kicks_exactly_when_avail_event_is_passed",
        SPLIT,
        "            passed = (self._avail_idx - event - 1) & 0xFFFF\n",
        "            passed = (self._avail_idx - event) & 0xFFFF\n",
    ),
    # vhost-user
    Mutant(
        "VHU-1",
        f"{USER}::test_every_header_is_well_formed",
        SESSION,
        "VERSION | (NEED_REPLY if acked else 0)",
        "VERSION | REPLY | (NEED_REPLY if acked else 0)",
    ),
    Mutant(
        "VHU-2",
        f"{USER}::test_descriptors_come_with_the_messages_that_name_them",
        FRONT,
        "VringFd(index).encode(), [call])\n",
        "VringFd(index).encode(), [call, kick])\n",
    ),
    Mutant(
        "VHU-3",
        f"{USER}::test_a_wrong_reply_ends_the_connection",
        SESSION,
        "                if reply.request != message.request or not reply.flags & REPLY:\n",
        "                if False:\n",
    ),
    Mutant(
        "VHU-4",
        f"{USER}::test_each_reply_is_awaited_before_the_next_message",
        SESSION,
        "        refusal = self._exchange(message, decode_u64 if acked else None)\n",
        "        refusal = self._exchange(message, None)\n",
    ),
    Mutant(
        "VHU-5",
        f"{USER}::test_each_extension_is_used_if_offered_and_done_without_if_not",
        FRONT,
        "            taken = offered & _EXTENSIONS\n",
        "            taken = _EXTENSIONS\n",
    ),
    Mutant(
        "VHU-6",
        f"{USER}::test_set_owner_comes_first_and_once",
        FRONT,
        "        session.tell(Request.SET_OWNER)\n",
        "        session.tell(Request.SET_OWNER)\n        session.tell(Request.SET_OWNER)\n",
    ),
    Mutant(
        "VHU-7",
        f"{USER}::test_a_bare_back_end_works",
        FRONT,
        "        if self._offered & PROTOCOL_FEATURES:\n",
        "        if True:\n",
    ),
    Mutant(
        "VHU-8",
        f"{USER}::test_bit_30_is_accepted_and_then_every_ring_is_enabled",
        FRONT,
        "        self._features = features | self._offered & PROTOCOL_FEATURES\n",
        "        self._features = features\n",
    ),
    Mutant(
        "VHU-8",
        f"{USER}::test_bit_30_is_accepted_and_then_every_ring_is_enabled",
        FRONT,
        "                self._session.tell(Request.SET_VRING_ENABLE, payload)\n",
        "                index or self._session.tell(Request.SET_VRING_ENABLE, payload)\n",
    ),
    Mutant(
        "VHU-9",
        f"{USER}::test_rings_are_stopped_with_num_0_after_all_requests_are_back",
        FRONT,
        "            payload = VringState(index, 0).encode()\n",
        "            payload = VringState(0, 0).encode()\n",
    ),
    Mutant(
        "VHU-10",
        f"{USER}::test_rings_are_stopped_with_num_0_after_all_requests_are_back",
        FRONT,
        "            payload = VringState(index, 0).encode()\n",
        "            payload = VringState(index, 1).encode()\n",
    ),
    Mutant(
        "VHU-11",
        f"{USER}::test_without_mq_a_device_still_works",
        FRONT,
        "        if session.features & ProtocolFeature.MQ:\n",
        "        if True:\n",
    ),
    Mutant(
        "VHU-12",
        f"{USER}::test_a_memory_table_has_as_many_descriptors_as_regions",
        FRONT,
        "            session.tell(Request.SET_MEM_TABLE, payload, self._region_fds)\n",
        "            session.tell(Request.SET_MEM_TABLE, payload, self._region_fds * 2)\n",
    ),
    Mutant(
        "VHU-13",
        f"{USER}::test_rings_are_named_by_user_addresses_and_buffers_by_guest_addresses",
        FRONT,
        "        return Mapping.contiguous(shared.guest_address)\n",
        "        return Mapping.contiguous(shared.user_address)\n",
    ),
    Mutant(
        "VHU-14",
        f"{USER}::test_a_back_end_without_a_memory_slot_is_refused",
        FRONT,
        "        if len(self._regions) >= self._slots:\n",
        "        if False:\n",
    ),
    Mutant(
        "VHU-15",
        f"{USER}::test_kick_and_call_carry_the_index_and_one_descriptor",
        WIRE,
        "        return encode_u64(self.index | NOFD * self.nofd)\n",
        "        return encode_u64(self.index | NOFD * 2)\n",
    ),
    Mutant(
        "VHU-16",
        f"{USER}::test_get_config_asks_for_something_and_sends_as_many_bytes",
        FRONT,
        "ConfigSpace(0, nbytes).encode()",
        "ConfigSpace(0, nbytes, 1).encode()",
    ),
    Mutant(
        "VHU-16",
        f"{USER}::test_get_config_asks_for_something_and_sends_as_many_bytes",
        FRONT,
        "ConfigSpace(0, nbytes).encode()",
        "ConfigSpace(0, nbytes).encode()[:12]",
    ),
    Mutant(
        "VHU-17",
        f"{USER}::test_each_extension_is_used_if_offered_and_done_without_if_not",
        FRONT,
        "        if session.features & ProtocolFeature.BACKEND_REQ:\n",
        "        if True:\n",
    ),
    Mutant(
        "VHU-18",
        f"{USER}::test_requests_of_the_back_end_are_answered_if_it_wants_that",
        FRONT,
        "        refused = message.request != BackendRequest.CONFIG_CHANGE_MSG\n",
        "        refused = False\n",
    ),
    Mutant(
        "VHU-18",
        f"{USER}::test_requests_of_the_back_end_are_answered_if_it_wants_that",
        WIRE,
        "    return bool(acks and message.flags & NEED_REPLY and not own)\n",
        "    return bool(acks and not own)\n",
    ),
    Mutant(
        "VHU-19",
        f"{USER}::test_an_acknowledgement_other_than_0_is_a_failure",
        SESSION,
        "        if refusal:\n",
        "        if False:\n",
    ),
    *(
        Mutant(
            clause,
            f"{USER}::test_nothing_of_migration_or_of_other_machines_is_taken",
            FRONT,
            "            taken = offered & _EXTENSIONS\n",
            f"            taken = offered & (_EXTENSIONS | 1 << {bit})\n",
        )
        for clause, bit in [
            ("VHU-20", 12),
            ("VHU-21", 14),
            ("VHU-25", 8),
            ("VHU-26", 19),
        ]
    ),
    Mutant(
        "VHU-23",
        f"{INIT}::test_without_status_rings_are_kicked_after_all_are_enabled",
        FRONT,
        "        self._status = status\n        if self._session.features & ProtocolFeature.STATUS:\n",
        "        self._status = status\n        if True:\n",
    ),
    Mutant(
        "VHU-24",
        f"{USER}::test_the_memory_stays_until_the_last_ring_has_stopped",
        FRONT,
        "            payload = VringState(index, 0).encode()\n",
        "            payload = VringState(index, 0).encode()\n"
        "            index or self._session.tell(\n"
        "                Request.REM_MEM_REG, SingleMemoryRegion(self._regions[0]).encode()\n"
        "            )\n",
    ),
    # virtio-blk
    Mutant(
        "BLK-1",
        f"{BLOCK}::test_a_flush_is_sent_only_if_it_was_negotiated",
        BLK,
        "            flush=_plain(RequestType.FLUSH) if self.features & BlkFeature.FLUSH else None,\n",
        "            flush=_plain(RequestType.FLUSH),\n",
    ),
    Mutant(
        "BLK-3",
        f"{BLOCK}::test_writeback_is_not_read_before_features_ok",
        BASE,
        "    status |= Status.FEATURES_OK\n",
        "    transport.read_config(60, [])\n    status |= Status.FEATURES_OK\n",
    ),
    Mutant(
        "BLK-6",
        f"{BLOCK}::test_nothing_beyond_the_capacity_is_asked_for",
        BDEV,
        "offset + nbytes > self.size:\n",
        "offset > self.size:\n",
    ),
    Mutant(
        "BLK-7",
        f"{BLOCK}::test_a_read_only_disk_gets_no_writes",
        BDEV,
        "        if write and self.read_only:\n",
        "        if False:\n",
    ),
    Mutant(
        "BLK-8",
        f"{BLOCK}::test_a_flush_has_sector_0_and_no_data",
        BLK,
        "    return Template(RequestHeader(kind, 0, 0).encode())\n",
        "    return Template(RequestHeader(kind, 0, 1).encode())\n",
    ),
    Mutant(
        "BLK-9",
        f"{BLOCK}::test_random_ranges_never_leave_the_disk_or_the_grid",
        BDEV,
        "            odd = (offset | nbytes) & (self.block_size - 1)",
        "            odd = offset & (self.block_size - 1)",
    ),
    Mutant(
        "BLK-10",
        f"{BLOCK}::test_discard_and_write_zeroes_carry_whole_segments_within_their_limits",
        BLK,
        "        payload=Range(0, 0, flags).encode(),\n",
        "        payload=Range(0, 0, flags).encode()[:12],\n",
    ),
    Mutant(
        "BLK-11",
        f"{BLOCK}::test_the_identity_is_read_into_20_bytes",
        BLK,
        "            lease.queue.submit(template, 0, ID_SIZE, buffer.offset, 0)\n",
        "            lease.queue.submit(template, 0, 16, buffer.offset, 0)\n",
    ),
    Mutant(
        "BLK-14",
        f"{BLOCK}::test_discard_and_write_zeroes_carry_whole_segments_within_their_limits",
        BLK,
        "            unmap=_on_range(RequestType.DISCARD, 0) if unmap else None,\n",
        "            unmap=_on_range(RequestType.DISCARD, UNMAP) if unmap else None,\n",
    ),
    Mutant(
        "BLK-17",
        f"{BLOCK}::test_seg_max_and_size_max_are_kept_to",
        DEVICE,
        "        self.segment_bytes = min(segment_bytes, MAX_TRANSFER)\n",
        "        self.segment_bytes = MAX_TRANSFER\n",
    ),
    Mutant(
        "BLK-17",
        f"{BLOCK}::test_discard_and_write_zeroes_carry_whole_segments_within_their_limits",
        BLK,
        "                max_unmap=unmap,\n",
        "                max_unmap=1 << 30,\n",
    ),
    Mutant(
        "BLK-5",
        f"{BLOCK}::test_a_disk_that_changes_its_size_has_it_at_once",
        FRONT,
        "            self.on_config_change()\n",
        "            pass\n",
    ),
    # SCSI
    Mutant(
        "SCS-1",
        f"{UNITS}::test_the_configuration_space_is_never_written",
        FRONT,
        "        return self._session.ask(Request.GET_CONFIG",
        "        self._session.tell(Request.SET_CONFIG, ConfigSpace(0, 1).encode())\n"
        "        return self._session.ask(Request.GET_CONFIG",
    ),
    Mutant(
        "SCS-2",
        f"{UNITS}::test_a_unit_never_has_more_commands_than_cmd_per_lun",
        SCSI,
        "        total = self.config.cmd_per_lun - self._wants_spare(queues)\n",
        "        total = self.config.cmd_per_lun + queues\n",
    ),
    Mutant(
        "SCS-3",
        f"{UNITS}::test_priorities_and_attributes_are_zero",
        DIALOGUE,
        "    request = RequestHeader(address, 0, cdb=cdb).encode()\n",
        "    request = RequestHeader(address, 0, 1, cdb=cdb).encode()\n",
    ),
    Mutant(
        "SCS-4",
        f"{EXPLAIN}::test_a_scsi_response_becomes_an_error_that_a_person_understands",
        SCSI_ERRORS,
        "    ResponseCode.BUSY: (errno.EBUSY, True),\n",
        "    ResponseCode.BUSY: (errno.EBUSY, True), ResponseCode.TARGET_FAILURE: (errno.EIO, True),\n",
    ),
    Mutant(
        "SCS-5",
        f"{UNITS}::test_event_buffers_are_as_large_as_events_and_never_run_out",
        EVENT_QUEUE,
        "            event = self._read(head)\n            self._offer(head)\n",
        "            event = self._read(head)\n",
    ),
    Mutant(
        "SCS-6",
        f"{UNITS}::test_event_buffers_are_as_large_as_events_and_never_run_out",
        EVENT_QUEUE,
        "self._ring.describe(head, address, self._step, DESC_WRITE, 0)",
        "self._ring.describe(head, address, self._step, 0, 0)",
    ),
    Mutant(
        "SCS-7",
        f"{UNITS}::test_missed_events_mean_that_everything_is_looked_for",
        SCSI,
        "        if event is None or event.missed:\n",
        "        if event is None:\n",
    ),
    Mutant(
        "SCS-8",
        f"{UNITS}::test_an_event_of_lun_0_means_the_whole_target",
        SCSI,
        "            self._rescan_soon([target])\n",
        "            self.chores.add(event, functools.partial(self._revalidate, (target, lun)))\n",
    ),
    Mutant(
        "SCS-9",
        f"{UNITS}::test_every_unit_is_addressed_in_the_flat_form",
        SCSI_WIRE,
        "    return bytes((1, target, 0x40 | lun >> 8, lun & 0xFF, 0, 0, 0, 0))\n",
        "    return bytes((1, target, lun >> 8, lun & 0xFF, 0, 0, 0, 0))\n",
    ),
    Mutant(
        "SCS-10",
        f"{UNITS}::test_a_device_with_other_sizes_after_a_reset_is_refused",
        SCSI,
        "        if (config.sense_size, config.cdb_size) != (SENSE_SIZE, CDB_SIZE):\n",
        "        if False:\n",
    ),
    Mutant(
        "SCS-11",
        f"{UNITS}::test_transfers_keep_to_max_sectors_and_seg_max",
        SCSI_DISK,
        "    limit = min(most, config.max_sectors * _SECTOR or most)\n",
        "    limit = most\n",
    ),
    Mutant(
        "SCS-11",
        f"{UNITS}::test_targets_and_units_beyond_the_limits_are_not_asked",
        "src/virtio/device/probe.py",
        "    return sorted({lun for lun in luns if lun <= max_lun})\n",
        "    return sorted(set(luns))\n",
    ),
    Mutant(
        "CLN-2",
        f"{UNITS}::test_a_late_request_is_aborted_by_its_tag_and_the_queue_goes_on",
        RECOVERY,
        "        yield TaskFunction.ABORT_TASK, header.lun, header.tag\n",
        "        yield TaskFunction.ABORT_TASK, header.lun, header.tag + 1\n",
    ),
    Mutant(
        "VHU-22",
        f"{RESET}::test_what_the_device_had_is_sent_again_and_completes_once",
        FRONT,
        "        if self._session.features & ProtocolFeature.RESET_DEVICE:\n",
        "        if True:\n",
    ),
    Mutant(
        "RST-1",
        f"{RESET}::test_what_the_device_had_is_sent_again_and_completes_once",
        DEVICE,
        "        self.transport.renew()\n",
        "        pass\n",
    ),
    # PCI
    Mutant(
        "STA-3",
        f"{PCI}::test_a_device_that_needs_a_reset_is_given_up",
        PCI_BASE,
        "        elif status & Status.DEVICE_NEEDS_RESET:\n",
        "        elif False:\n",
    ),
    Mutant(
        "RFB-2",
        f"{PCI}::test_behind_an_iommu_a_device_must_know_of_it",
        MODERN,
        "        if windows.translated:\n",
        "        if False:\n",
    ),
    Mutant(
        "RFB-2",
        f"{LEGACY_PCI}::test_behind_an_iommu_it_is_refused",
        LEGACY,
        "        if self.windows.translated:\n",
        "        if False:\n",
    ),
    Mutant(
        "RST-1",
        f"{PCI}::test_a_reset_is_awaited",
        PCI_BASE,
        '        self._wait(lambda: self.status() == 0, "read status 0 after a reset")\n',
        "        self.status()\n",
    ),
    Mutant(
        "CFG-1",
        f"{PCI}::test_the_configuration_is_of_one_moment",
        MODERN,
        "            if self._common.read(Common.CONFIG_GENERATION) == before:\n"
        "                self._generation",
        "            if True:\n                self._generation",
    ),
    Mutant(
        "CFG-1",
        f"{LEGACY_PCI}::test_a_configuration_that_never_holds_still_is_given_up",
        LEGACY,
        "            if space == before:\n",
        "            if True:\n",
    ),
    Mutant(
        "CFG-2",
        f"{PCI}::test_fields_are_read_by_their_widths_and_only_if_their_feature_was_accepted",
        BLK,
        "        own = self.features & DEVICE_BITS\n",
        "        own = self.WANTED\n",
    ),
    Mutant(
        "CFG-3",
        f"{PCI}::test_a_longer_configuration_is_accepted_and_a_shorter_one_is_not",
        MODERN,
        "        if device.nbytes < nbytes:\n",
        "        if device.nbytes != nbytes:\n",
    ),
    Mutant(
        "VQR-1",
        f"{PCI}::test_a_queue_reset_is_awaited_and_the_queue_set_up_as_at_first",
        MODERN,
        '        self._wait(lambda: self._common.read(Common.QUEUE_RESET) == 0, f"reset queue {index}")\n',
        "        pass\n",
    ),
    Mutant(
        "VQR-2",
        f"{PCI}::test_a_queue_reset_is_awaited_and_the_queue_set_up_as_at_first",
        MODERN,
        "        common.write(Common.QUEUE_SIZE, areas.size)\n",
        "        if not hasattr(self, f'_told{index}'):\n"
        "            common.write(Common.QUEUE_SIZE, areas.size)\n"
        "        setattr(self, f'_told{index}', True)\n",
    ),
    Mutant(
        "PCI-1",
        f"{PCI_SPACE}::test_the_device_type_is_in_the_device_id",
        PCI_WIRE,
        "_FIRST_ID, _LAST_ID = 0x1040, 0x107F",
        "_FIRST_ID, _LAST_ID = 0x1041, 0x107F",
    ),
    Mutant(
        "PCI-1",
        f"{PCI}::test_the_type_comes_from_the_device",
        PCI_WIRE,
        "0x1004: 8",
        "0x1004: 9",
    ),
    Mutant(
        "PCI-3",
        f"{PCI}::test_a_device_is_brought_up_and_taken_down_by_the_rules",
        PCI_WIRE,
        "    QUEUE_ENABLE = Register(28, 2)\n",
        "    QUEUE_ENABLE = Register(28, 4)\n",
    ),
    Mutant(
        "PCI-3",
        f"{PCI}::test_fields_are_read_by_their_widths_and_only_if_their_feature_was_accepted",
        PCI_BASE,
        "            part = min(4, offset + width - at)\n",
        "            part = 4\n",
    ),
    Mutant(
        "PCI-4",
        f"{PCI_SPACE}::test_capabilities_of_reserved_or_other_types_are_passed_over",
        PCI_WIRE,
        "    if cfg_type not in _KINDS or (",
        "    if (",
    ),
    Mutant(
        "PCI-5",
        f"{PCI}::test_the_first_of_two_is_taken",
        MODERN,
        "    for structure in function.structures:\n        if structure.kind",
        "    for structure in reversed(function.structures):\n        if structure.kind",
    ),
    Mutant(
        "PCI-5",
        f"{PCI}::test_the_first_usable_common_configuration_is_taken",
        MODERN,
        "            if nbytes >= needed:\n",
        "            if True:\n",
    ),
    Mutant(
        "PCI-6",
        f"{PCI_SPACE}::test_a_longer_capability_is_accepted",
        PCI_WIRE,
        "    if size < needed or",
        "    if size != needed or",
    ),
    Mutant(
        "PCI-7",
        f"{PCI_SPACE}::test_a_capability_with_a_reserved_bar_is_passed_over",
        PCI_WIRE,
        "bar >= BARS and cfg_type",
        "bar > BARS and cfg_type",
    ),
    Mutant(
        "PCI-8",
        f"{PCI}::test_unexpectedly_large_structures_are_handled",
        MODERN,
        "            nbytes = min(structure.length, room - structure.offset)\n",
        "            nbytes = structure.length if structure.length <= room - structure.offset else 0\n",
    ),
    Mutant(
        "PCI-9",
        f"{PCI}::test_without_access_to_bars_registers_are_reached_through_configuration_space",
        MODERN,
        "        self._windows.write_config(self._at + _BAR, 1, self._bar)\n",
        "        self._windows.write_config(self._at + _BAR - 1, 1, self._bar)\n",
    ),
    Mutant(
        "PCI-10",
        f"{PCI}::test_a_device_is_brought_up_and_taken_down_by_the_rules",
        MODERN,
        "        offset = self._common.read(Common.QUEUE_NOTIFY_OFF) *",
        "        self._common.write(Common.QUEUE_NOTIFY_OFF, index)\n"
        "        offset = self._common.read(Common.QUEUE_NOTIFY_OFF) *",
    ),
    Mutant(
        "PCI-11",
        f"{PCI}::test_a_queue_is_as_large_as_the_device_allows_and_a_power_of_two",
        MODERN,
        "        return 1 << size.bit_length() - 1 if size else 0\n",
        "        return size\n",
    ),
    Mutant(
        "PCI-12",
        f"{PCI}::test_a_device_is_brought_up_and_taken_down_by_the_rules",
        MODERN,
        "        common.write(Common.QUEUE_SIZE, areas.size)\n",
        "        common.write(Common.QUEUE_ENABLE, 1)\n        common.write(Common.QUEUE_SIZE, areas.size)\n",
    ),
    Mutant(
        "PCI-13",
        f"{PCI}::test_a_reset_is_awaited",
        PCI_BASE,
        '        self._wait(lambda: self.status() == 0, "read status 0 after a reset")\n',
        "        pass\n",
    ),
    Mutant(
        "PCI-13",
        f"{PCI}::test_a_reset_that_never_ends_is_given_up",
        PCI_BASE,
        "            if time.monotonic() > deadline:\n",
        "            if time.monotonic() > deadline + 2:\n",
    ),
    Mutant(
        "PCI-14",
        f"{PCI}::test_a_device_is_brought_up_and_taken_down_by_the_rules",
        MODERN,
        "        common.write(Common.QUEUE_SIZE, areas.size)\n",
        "        common.write(Common.QUEUE_SIZE, areas.size)\n        common.write(Common.QUEUE_ENABLE, 0)\n",
    ),
    Mutant(
        "PCI-15",
        f"{PCI}::test_a_queue_reset_is_awaited_and_the_queue_set_up_as_at_first",
        MODERN,
        "self._common.read(Common.QUEUE_RESET) == 0, f",
        "self._common.read(Common.QUEUE_RESET) >= 0, f",
    ),
    Mutant(
        "PCI-17",
        f"{PCI}::test_a_configuration_interrupt_alone_changes_nothing",
        PCI_BASE,
        "        self._pass_on()\n        with self._complaining():\n            self._look_at_config()\n",
        "        self._pass_on()\n"
        "        with self._complaining():\n"
        "            self._read_isr()\n"
        "            self._look_at_config()\n",
    ),
    Mutant(
        "PCI-19",
        f"{PCI}::test_without_access_to_bars_registers_are_reached_through_configuration_space",
        MODERN,
        "        self._windows.write_config(self._at + _LENGTH, 4, register.width)\n",
        "        self._windows.write_config(self._at + _LENGTH, 4, 4)\n",
    ),
    Mutant(
        "PCI-20",
        f"{PCI}::test_where_the_table_is_small_queues_share_vector_0",
        PCI_BASE,
        "        if own < len(vectors) and",
        "        if vectors and own <= len(vectors) and",
    ),
    Mutant(
        "PCI-20",
        f"{PCI}::test_a_vector_that_the_device_refuses_is_replaced",
        MODERN,
        "        return self._common.read(register) == vector\n",
        "        self._common.read(register)\n        return True\n",
    ),
    Mutant(
        "PCI-20",
        f"{LEGACY_PCI}::test_a_vector_that_the_device_refuses_is_replaced",
        LEGACY,
        "        return self._load(register) == vector\n",
        "        self._load(register)\n        return True\n",
    ),
    Mutant(
        "PCI-21",
        f"{BELL_TEST}::test_a_mapped_register_is_stored_to_with_its_width",
        BELL,
        "                store_u16(self._mem, self._at, self._value)\n",
        "                store_u32(self._mem, self._at, self._value)\n",
    ),
    Mutant(
        "PCI-21",
        f"{PCI}::test_each_queue_is_notified_at_its_own_place",
        MODERN,
        "QUEUE_NOTIFY_OFF) * self._notify.multiplier\n",
        "QUEUE_NOTIFY_OFF) * 2\n",
    ),
    Mutant(
        "PCI-22",
        f"{PCI}::test_with_notif_config_data_that_is_what_is_written",
        MODERN,
        "        if self._features & Feature.NOTIF_CONFIG_DATA:\n",
        "        if False:\n",
    ),
    Mutant(
        "PCI-23",
        f"{PCI}::test_where_the_table_is_small_queues_share_vector_0",
        PCI_BASE,
        "        self._pass_on()\n        with self._complaining():\n            self._look_at_config()\n",
        "        with self._complaining():\n            self._look_at_config()\n",
    ),
    Mutant(
        "PCI-23",
        f"{PCI}::test_where_there_is_no_msix_all_queues_share_the_line",
        PCI_BASE,
        "            if reasons & _QUEUE_INTERRUPT:\n                self._pass_on()\n            if reasons",
        "            if reasons & _QUEUE_INTERRUPT:\n"
        "                self._pass_on()\n"
        "            elif reasons",
    ),
    Mutant(
        "SPL-1",
        f"{LEGACY_PCI}::test_the_ring_is_where_a_legacy_device_looks_for_it",
        DEVICE,
        "            return LEGACY\n",
        "            return SPLIT\n",
    ),
    Mutant(
        "BLK-5",
        f"{LEGACY_PCI}::test_a_change_of_the_configuration_is_seen_by_looking",
        LEGACY,
        "        return self._read_config(nbytes, fields) != space\n",
        "        return False\n",
    ),
    # The packed ring
    Mutant(
        "PKD-1",
        f"{PACKED_RING}::test_the_three_areas_are_aligned_and_apart",
        PACKED,
        "    return driver, driver + _LINE, driver + 2 * _LINE\n",
        "    return driver + 2, driver + _LINE, driver + 2 * _LINE\n",
    ),
    Mutant(
        "PKD-2",
        f"{PACKED_RING}::test_a_reset_amid_requests_loses_none",
        PACKED,
        "        fill(self._mem, 0, 0, len(self._view))\n",
        "        fill(self._mem, 0, 255, len(self._view))\n",
    ),
    Mutant(
        "PKD-4",
        f"{PACKED_RING}::test_every_list_is_well_formed",
        PACKED,
        "            if not flags & NEXT:\n                break\n",
        "            if not flags & NEXT and count > 9:\n                break\n",
    ),
    Mutant(
        "PKD-5",
        f"{PACKED_RING}::test_every_list_is_well_formed",
        FILLED,
        "                store_u16(self._region, entry + 14, flags & WRITE)\n",
        "                store_u16(self._region, entry + 14, WRITE - (flags & WRITE))\n",
    ),
    Mutant(
        "PKD-6",
        f"{PACKED_RING}::test_every_list_is_well_formed",
        LAYOUT,
        "    slots = size if indirect else size // (2 + segments)\n",
        "    slots = size if indirect else size // 2\n",
    ),
    Mutant(
        "PKD-7",
        f"{PACKED_RING}::test_nothing_is_shown_before_it_is_published_and_the_first_one_last",
        PACKED,
        "            if count:\n                store_u16(self._mem, place + FLAGS, flags | bits)\n",
        "            if count + 1:\n                store_u16(self._mem, place + FLAGS, flags | bits)\n",
    ),
    Mutant(
        "PKD-8",
        f"{PACKED_RING}::test_every_list_is_well_formed",
        FILLED,
        "            if self.packed:  # no chain, whose order is that of the table (2.8.7)\n",
        "            if self.packed and index == 1:\n",
    ),
    Mutant(
        "PKD-9",
        f"{PACKED_RING}::test_every_list_is_well_formed",
        FILLED,
        "            self._describe_ring(slot, table, 16 * total, INDIRECT, 0)\n",
        "            self._describe_ring(slot, table, 16 * total + 8, INDIRECT, 0)\n",
    ),
    Mutant(
        "PKD-10",
        f"{PACKED_RING}::test_every_list_is_well_formed",
        FILLED,
        "            self._describe_ring(slot, table, 16 * total, INDIRECT, 0)\n",
        "            self._describe_ring(slot, table, 16 * total, INDIRECT | NEXT, 0)\n",
    ),
    Mutant(
        "PKD-12",
        f"{PACKED_RING}::test_whether_to_kick_agrees_with_counters_that_never_wrap",
        PACKED,
        "            event -= self.size\n",
        "            event += self.size\n",
    ),
    Mutant(
        "PKD-12",
        f"{PACKED_RING}::test_what_it_asks_for_when_it_sleeps_and_when_it_does_not",
        PACKED,
        "self._used | (WRAP if self._used_wrap else 0)",
        "self._used | WRAP",
    ),
]


class Outcome(NamedTuple):
    """`note` says what is odd, or what went wrong."""

    mutant: Mutant
    killed: bool
    note: str


def copy(folder: Path) -> None:
    """Put what a test needs into `folder`."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.c", "peers")
    for name in ("src", "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


def pytest(folder: Path, tests: list[str], *arguments: str, patience: float) -> tuple[int, str]:
    """Run tests in a copy, interpreted: pytest's exit status, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", *arguments, *tests]
    environment = os.environ | {
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VIRTIO_INTERPRETED": "1",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def baseline(tests: list[str]) -> str:
    """What the tests that are to kill mutants say without any: "" if all pass."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy(Path(name))
        status, output = pytest(Path(name), tests, patience=600)
    return "" if status == 0 else output[-2000:]


def mutate(mutant: Mutant, folder: Path) -> str:
    """Make the change in a copy in `folder`; what is wrong with the row, or ""."""
    text = (ROOT / mutant.path).read_text()
    count = text.count(mutant.snippet)
    if count != 1:
        return f"the snippet occurs {count} times in {mutant.path}"
    changed = text.replace(mutant.snippet, mutant.replacement)
    try:
        compile(changed, mutant.path, "exec")
    except SyntaxError as error:
        return f"no Python: {error}"
    copy(folder)
    (folder / mutant.path).write_text(changed)
    return ""


def run(mutant: Mutant) -> Outcome:
    """Whether the mutant's test fails on it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        wrong = mutate(mutant, folder)
        if wrong:
            return Outcome(mutant, False, wrong)
        try:
            limit = f"--timeout={PATIENCE - 20}"
            status, output = pytest(folder, [mutant.test], "-x", limit, patience=PATIENCE)
        except subprocess.TimeoutExpired:
            return Outcome(mutant, True, "it hung")
    if status == 1:
        return Outcome(mutant, True, "")
    return Outcome(mutant, False, "" if status == 0 else f"pytest {status}: {output[-600:]}")


def one_line(text: str) -> str:
    return " ".join(text.split())


def describe(mutant: Mutant) -> str:
    """A mutant as `before -> after`."""
    return f"{one_line(mutant.snippet)} -> {one_line(mutant.replacement)}"


def tests_by_clause() -> dict[str, list[str]]:
    """The tests whose docstrings name a clause."""
    found: dict[str, list[str]] = defaultdict(list)
    beside = (ROOT / path for path in (PCI, LEGACY_PCI, PCI_SPACE, BELL_TEST))
    for path in (*sorted((ROOT / CONFORMANCE).glob("test_*.py")), *beside):
        where = path.stem if path.parent.name == "conformance" else f"{path.parent.name}/{path.stem}"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for clause in dict.fromkeys(re.findall(r"[A-Z]{3}-\d+", ast.get_docstring(node) or "")):
                    found[clause].append(f"{where}::{node.name}")
    return found


def write_docs(outcomes: list[Outcome]) -> None:
    """docs/conformance.md."""
    tests = tests_by_clause()
    lines = [
        "# Conformance",
        "",
        "Generated by `make mutants ARGS=--write-docs`. What a driver and a vhost-user front end must do",
        "(M) or should do (S), in our own words, after the virtio specification 1.4 and QEMU's",
        "docs/interop/vhost-user.rst; the tests that prove it against a recording device model",
        "(`tests/model`, which imports nothing of the driver); and whether those tests notice when the",
        "clause is broken by a change of one line (`tests/mutants.py`). Level -: a fact of the layout,",
        'neither must nor should. Tests "none": in none of these files; the last column says why, or a',
        "test elsewhere kills the mutant.",
        "",
        "| clause | level | what | tests | mutants killed |",
        "|---|---|---|---|---|",
    ]
    for clause in CLAUSES:
        mine = [outcome for outcome in outcomes if outcome.mutant.clause == clause.id]
        killed = f"{sum(o.killed for o in mine)} of {len(mine)}" if mine else clause.why_none or "none"
        names = "<br>".join(f"`{name.replace('::test_', ': ')}`" for name in tests[clause.id]) or "none"
        lines.append(f"| {clause.id} | {clause.level} | {clause.text} | {names} | {killed} |")
    DOCS.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("clauses", nargs="*", help="only these, such as SPL-17")
    parser.add_argument("--write-docs", action="store_true", help=f"write {DOCS.relative_to(ROOT)}")
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if not options.clauses or m.clause in options.clauses]
    wrong = baseline(sorted({mutant.test for mutant in mutants}))
    if wrong:
        print(f"{wrong}\nthese tests prove nothing: they fail without a mutant too")
        return 1
    outcomes: list[Outcome] = []
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for outcome in pool.map(run, mutants):
            outcomes.append(outcome)
            mutant = outcome.mutant
            verdict = "killed" if outcome.killed else "SURVIVED"
            print(f"{mutant.clause:7} {verdict:9} {mutant.test.split('::')[1]}")
            print(f"{'':17} {mutant.path}: {describe(mutant)}")
            if outcome.note:
                print(f"{'':17} {outcome.note}")
            sys.stdout.flush()
    survivors = [outcome for outcome in outcomes if not outcome.killed]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} mutants killed")
    covered = {mutant.clause for mutant in MUTANTS}
    bare = [c.id for c in CLAUSES if c.level == "M" and c.id not in covered and not c.why_none]
    if bare:
        print(f"without a mutant, and without a reason: {', '.join(bare)}")
    if options.write_docs and not options.clauses:
        write_docs(outcomes)
        print(f"wrote {DOCS.relative_to(ROOT)}")
    return 1 if survivors or bare else 0


if __name__ == "__main__":
    sys.exit(main())
