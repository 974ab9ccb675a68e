"""Chunks on threads: their order, and an interrupt that waits for none."""

from __future__ import annotations

import signal
import threading

import pytest

pytest.importorskip("torch")

import torch

from bandpo.replay.threads import in_threads


def test_results_come_in_the_order_of_the_chunks() -> None:
    assert list(in_threads(lambda chunk: chunk * chunk, range(200))) == [k * k for k in range(200)]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of Unix")
def test_an_interrupt_does_not_wait_for_chunks_under_way() -> None:
    go_on, begun = threading.Event(), []

    def work(chunk: int) -> int:
        begun.append(chunk)
        assert go_on.wait(60.0)
        return chunk

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        # It is raised while no chunk can end.
        with pytest.raises(KeyboardInterrupt):
            list(in_threads(work, range(200)))
        under_way = len(begun)
    finally:
        signal.signal(signal.SIGALRM, before)
        go_on.set()
    assert under_way < 200
    assert torch.get_num_threads() == threads
    assert list(in_threads(lambda chunk: -chunk, range(3))) == [0, -1, -2]
    assert len(begun) == under_way  # the others were cancelled
