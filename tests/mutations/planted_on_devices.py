"""Faults that only a device shows: something is read, sent or asked for before it is there.

On a CPU everything happens in the order of the program, so their tests run on the simulated NPU,
where copies, kernels and transfers are held up: `python tests/mutations --npu`, in the environment
of ``tox -e npu``.
"""

from __future__ import annotations

from planted import fault

__all__ = ["FAULTS_ON_DEVICES"]


FAULTS_ON_DEVICES = (
    fault(
        "sent-before-the-current-stream-has-written",
        "migration/exchange.py",
        "    stream.wait_stream(module.current_stream(device))\n",
        "",
        "npu/test_order.py::test_what_is_sent_are_the_weights_that_the_current_stream_has_written",
    ),
    fault(
        "committed-before-it-is-received",
        "comm/transport.py",
        "        if all(completed):\n"
        "            return True\n"
        "        if time.monotonic() > self._deadline:\n"
        "            raise self._overdue()\n"
        "        return False\n\n"
        "    def synchronize(self) -> None:\n"
        "        for work in self._works:\n"
        "            work.wait()\n",
        "        return True\n",
        "npu/test_order.py::test_a_commit_comes_after_what_is_received",
    ),
    fault(
        "committed-before-the-side-stream-has-copied",
        "migration/exchange.py",
        "            device_module.current_stream(self._comm.device).wait_stream(self._stream)\n",
        "",
        "npu/test_order.py::test_a_commit_comes_after_the_copies_of_the_side_stream",
    ),
    fault(
        "checksum-read-before-its-event",
        "migration/exchange.py",
        "        return self._check[1].query()",
        "        return True",
        "npu/test_order.py::test_a_checksum_is_read_when_it_has_arrived",
    ),
    fault(
        "window-read-before-its-copies",
        "routing/load.py",
        "        return self._event is None or self._event.query()",
        "        return True",
        "npu/test_order.py::test_a_window_of_load_is_read_when_its_copies_have_arrived",
    ),
    fault(
        "host-table-not-updated-with-the-devices",
        "routing/tables.py",
        "            self._write(self.host_slots_LEM, index, slots)",
        "            pass",
        "npu/test_order.py::test_the_hosts_table_changes_with_the_devices",
    ),
    fault(
        "no-warm-up-on-a-device",
        "comm/communicator.py",
        "        self._warm_up()\n",
        "",
        "npu/test_order.py::test_the_communicator_of_weights_exists_when_wrap_returns",
    ),
    fault(
        "steps-while-a-graph-is-captured",
        "runtime/engine.py",
        "        if capturing(self.comm.device):\n            return  # no step is made\n",
        "",
        "npu/test_order.py::test_no_step_is_made_while_a_graph_is_captured_and_replays_see_the_moves",
    ),
    fault(
        "gloo-sends-before-the-copy-to-the-host",
        "comm/transport.py",
        "        if self._inner is None and self._sent.query():",
        "        if self._inner is None:",
        "npu/test_order.py::test_weights_through_the_hosts_memory_wait_for_its_copies",
    ),
    fault(
        "copies-from-pageable-memory",
        "routing/device.py",
        "    return tensor.pin_memory().to(device, non_blocking=True)",
        "    return tensor.to(device, non_blocking=True)",
        "npu/test_waits.py::test_a_table_update_neither_waits_nor_overtakes_the_one_before",
    ),
    # ---- what torch_npu and HCCL ask for ------------------------------------------------------
    fault(
        "tiles-not-refused",
        "layers/experts.py",
        '            _refuse_tiles(f"layer {where}: {name}", tensor)\n',
        "",
        "npu/test_losses.py::test_weights_in_tiles_are_refused_with_the_remedy",
    ),
    fault(
        "tiles-received-into-directly",
        "runtime/prepare.py",
        "    return config.direct and not any(layer.has_tiles for layer in layers)",
        "    return config.direct",
        "npu/test_listed.py::test_lists_move_in_place_in_whatever_format",
    ),
    fault(
        "lists-of-mixed-formats-not-refused",
        "layers/slots.py",
        '    tiles = "" if number is None else f":format {number}"',
        '    tiles = ""',
        "npu/test_listed.py::test_lists_of_mixed_formats_are_refused",
    ),
    fault(
        "another-device-not-refused",
        "runtime/prepare.py",
        "    _check_current(device)\n",
        "",
        "npu/test_losses.py::test_a_model_on_another_than_the_current_device_is_refused",
    ),
    fault(
        "watchdog-as-impatient-as-we",
        "comm/communicator.py",
        "_WATCHDOG_PATIENCE = 10\n",
        "_WATCHDOG_PATIENCE = 1\n",
        "npu/test_order.py::test_the_watchdog_of_weights_waits_much_longer_than_we_do",
    ),
    fault(
        "failed-transfers-are-complete",
        "comm/transport.py",
        "            if over and (error := work.exception()) is not None:",
        "            if over and (error := None) is not None:",
        "npu/test_losses.py::test_a_failed_transfer_is_not_committed",
    ),
    fault(
        "lost-peers-keep-the-stream",
        "runtime/engine.py",
        "            self.comm.abandon_data_plane()\n",
        "",
        "npu/test_losses.py::test_whoever_is_left_alone_lives_on_with_the_last_placement[dies]",
    ),
    fault(
        "several-messages-of-a-peer-in-one-batch",
        "comm/transport.py",
        "        return split_by_peer(self._operations)",
        "        return super()._batches()",
        "npu/test_order.py::test_no_batch_has_two_messages_from_one_rank_to_another",
    ),
    # ---- what Ascend does badly ---------------------------------------------------------------
    fault(
        "counted-in-64-bits",
        "routing/device.py",
        '_NARROW = ("npu",)',
        "_NARROW = ()",
        "npu/test_waits.py::test_a_forward_waits_as_often_as_is_documented_and_computes_in_32_bits",
    ),
    fault(
        "quotas-solved-by-default",
        "values/choices.py",
        '_NO_SOLVER: Mapping[str, ReplicaChoice] = {"npu": "table"}',
        "_NO_SOLVER: Mapping[str, ReplicaChoice] = {}",
        "npu/test_waits.py::test_nothing_of_a_rebalance_makes_the_host_wait_for_the_device",
    ),
    fault(
        "window-copied-to-pageable-memory",
        "routing/load.py",
        "pin_memory=self._on_device)",
        "pin_memory=False)",
        "npu/test_waits.py::test_nothing_of_a_rebalance_makes_the_host_wait_for_the_device",
    ),
)
