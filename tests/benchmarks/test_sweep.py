"""`bench all`: the worst first, and what was measured is not lost."""

import json

import pytest

from benchmarks import bench, growth, sweep
from gptjax.errors import RunError, UserError


def report(ours: float, *ratios: float, device: bool = False) -> dict:
    """With sides that hold 100, 80, 60 ... bytes."""
    rows = [
        {
            "side": {"g": "gptjax"}.get(side, side), "seconds": [1, 1, 1],
            "tokens_per_second": [ours, ours, ours],
            "gptjax_is_faster_by": [0, ratio, 9], "page_faults_per_unit": 3.0,
            "system_time_share": 0.1, "peak_resident_bytes": 100 - 20 * i,
            "peak_device_bytes": 1000 if device and i == 0 else 500 if device else None,
        }
        for i, (side, ratio) in enumerate(zip("gtc", (1.0, *ratios), strict=False))
    ]  # fmt: skip
    return {"mode": "train", "rows": rows}


def test_a_ratio_is_to_the_better_of_the_others():
    found = sweep.summary(report(5e3, 2.0, 1.5))
    assert found["ratio"] == 1.5 and found["memory"] == pytest.approx(100 / 60)
    assert sweep.summary(report(5e3, 2.0, device=True))["memory"] == 2.0


def test_the_worst_setting_comes_first():
    lines = sweep.table({"good": report(1e3, 3.0), "bad": report(2e3, 0.5)})
    assert [line.split()[0] for line in lines[1:]] == ["bad", "good"]
    assert "0.50x" in lines[1] and "2k tokens/s" in lines[1]


def test_a_setting_that_fails_costs_no_other(monkeypatch, tmp_path, capsys):
    def run(options, jobs, folder):
        if jobs[0].mode == "startup":
            raise RunError("too slow")
        return report(1e3, 2.0)

    monkeypatch.setattr(bench, "run", run)
    chosen = {"a": "train", "b": "startup", "c": "generate"}
    monkeypatch.setattr(sweep, "SETTINGS", chosen)
    sweep.main(["--out", str(tmp_path)], "bench all")
    out = capsys.readouterr().out
    assert "b: too slow" in out and "a: 2.00x" in out
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["reports"].keys() == {"a", "c"}
    other = {"machine": "Abacus, 10 cores, 1 GiB; Python 3.11.0", "reports": {}}
    (tmp_path / "2000-01-01.json").write_text(json.dumps(other))
    sweep.main(["--out", str(tmp_path), "--plot", str(tmp_path / "speed.png")], "bench all")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert "left out: 1 of other machines than " in capsys.readouterr().out
    assert sweep.hardware(other) == "Abacus, 10 cores"


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--only", "zzz"], "no setting contains 'zzz'"), (["--plot", "x.png"], "no report in"),
     (["--out", "file"], "name a folder")],
)  # fmt: skip
def test_what_cannot_be_done_is_said(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    with pytest.raises(UserError, match=words):
        sweep.main(["--out", str(tmp_path), *flags], "bench all")


def test_every_setting_is_one_that_the_benchmark_takes():
    for line in sweep.SETTINGS.values():
        bench.settings(line.split(), "bench")


def test_growth_is_noticed_and_less_is_not():
    before = {
        "temporary_bytes": 1000,
        "operations": 100,
        "compilations": 5,
        "faults": 0,
        "again": 0,
    }
    assert growth.grown(before | {"operations": 90, "faults": 50}, before) == []
    worse = {"temporary_bytes": 1100, "compilations": 6, "faults": 40_000, "again": 2}
    assert len(growth.grown(before | worse, before)) == 4
