"""eval --slices: by a column of one's own."""

import json

from helpers import write_table


def test_eval_slices_by_a_column(vlkit, tmp_path):
    """A column of one value is said, and cuts nothing."""
    from helpers import COLOURS, write_image

    rows = []
    for number in range(60):
        colour = list(COLOURS)[number % 5]
        write_image(tmp_path / f"raw/{number}.png", COLOURS[colour], seed=number)
        site = "leg" if number % 3 else "arm"
        rows.append({"image": f"{number}.png", "caption": f"{colour} thing {number}", "site": site, "year": 2020})
    write_table(tmp_path / "raw", rows)
    assert vlkit("prep", "--source", tmp_path / "raw", "--out", tmp_path / "data", "--test-share", 0.5).code == 0
    model = ("--model", "tiny-siglip", "--data", tmp_path / "data", "--out", tmp_path / "out")
    outcome = vlkit("eval", *model, "--slice-by", "site,year")
    assert outcome.code == 0, outcome.err
    assert "--slice-by year: these rows have one value only" in outcome.err
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["slices"]["site"]) == {"arm", "leg"}
    queries = sum(of["image_to_text"]["queries"] for of in results["slices"]["site"].values())
    assert queries == results["metrics"]["image_to_text"]["queries"]
    outcome = vlkit("eval", *model, "--slice-by", "sites")
    assert outcome.code == 2 and "did you mean 'site'" in outcome.err
