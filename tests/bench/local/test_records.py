"""A report as JSON and as tables."""

import json

from malora_dist.bench.local.records import Measurement, Report

REPORT = Report(
    {"CPU": "one", "cores": 2},
    "malora bench layer --size 8",
    [
        Measurement(
            "base", "small", median_s=0.0125, ratio=0.5, ratio_quartiles=(0.4, 0.6), against="peft", facts={"T": 4}
        ),
        Measurement(
            "peft", "small", median_s=2.5, ratio=1.0, ratio_quartiles=(1.0, 1.0), against="peft", facts={"T": 4}
        ),
        Measurement("base", "large", peak_bytes=3 * 2**20, facts={"trained": 1234567, "share": 0.12345, "fused": True}),
        Measurement("base", "two", ratio=1.0, against="base"),
        Measurement("base_2x", "two", ratio=2.0, against="base"),
        Measurement("peft", "two", ratio=1.0, against="peft"),
    ],
)


def test_json_and_back() -> None:
    written = json.loads(json.dumps(REPORT.as_dict()))
    assert Report.from_dict(written) == REPORT
    assert written["records"][3] == {"name": "base", "case": "two", "ratio": 1.0, "against": "base"}
    assert set(written) == {"machine", "command", "records"}


def test_a_sheet_for_each_case_with_the_columns_it_needs() -> None:
    small, large, two = REPORT.sheets()
    assert small.title == "small, T 4" and large.title == "large"
    assert small.headers == ("name", "seconds", "ratio to peft", "quartiles")
    assert small.rows == (("base", "12.5 ms", "0.500", "0.400-0.600"), ("peft", "2.500 s", "1.000", "1.000-1.000"))
    assert large.headers == ("name", "MiB peak", "trained", "share", "fused")
    assert large.rows == (("base", "3.0", "1,234,567", "0.1235", "yes"),)
    assert two.headers == ("name", "ratio", "against") and two.rows[1] == ("base_2x", "2.000", "base")


def test_markdown_holds_command_machine_and_tables() -> None:
    text = REPORT.markdown()
    assert text.startswith("    malora bench layer --size 8\n\n- CPU: one\n- cores: 2\n")
    assert text.count("### ") == 3 and "| base_2x | 2.000 | base |" in text
