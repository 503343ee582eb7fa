"""Memory of processes."""

import os

from benchmarks.memory import in_own_process, peak_mib, rss_mib


def test_memory_of_this_process():
    assert 0 < rss_mib() <= peak_mib() + 1


def test_function_in_a_process_of_its_own():
    assert in_own_process(os.getpid) != os.getpid()
    assert 0 < in_own_process(peak_mib) < peak_mib()
