"""A few rounds of tests/helpers/fuzz_json.py: no damaged JSON file ends in a traceback."""

from tests.helpers.fuzz_json import fuzz


def test_a_damaged_json_file_is_read_or_refused_in_one_line(tmp_path):
    counts, tracebacks = fuzz(tmp_path, seed=1, rounds=15)
    assert not tracebacks, "\n".join(tracebacks.values())
    assert len(counts) == 17 and all(set(count) <= {"read", "refused"} for count in counts.values()), counts
