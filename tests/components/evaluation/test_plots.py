"""DVC's plots: drawn without a network, from the templates and the files that dvc.yaml names."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parents[3]
CURVES = "step,video_mse,text_mse,text_ce\n" + "".join(f"{n},{9 / n},{5 / n},{n % 3 + 4 / n}\n" for n in range(1, 99))
HELDOUT = (
    "tau,video_mse,text_mse,text_ce,token_accuracy,token_accuracy_without_video\n0.1,3,2,1,.5,.1\n0.9,1,1,1,.6,.2\n"
)
FILES = {
    "scores.csv": "score,attribute,value,low,high,n\ncaptions,<b>,0.5,0.4,0.6,9\ncaptions,none,,,,0\n",
    "confusion.csv": "true,stated\n1,1\n1,7\n7,7\n7,not said\n",
    **{f"stage{n}_{kind}.csv": text for n in (1, 2) for kind, text in (("curves", CURVES), ("heldout", HELDOUT))},
}
DRAW = """
const html = require("fs").readFileSync(process.argv[1], "utf8"), drawn = {};
const scripts = [...html.matchAll(/<script[^>]*>([^]*?)<\\/script>/g)].map((found) => found[1]).join("\\n;");
const document = {querySelector: (id) => ({insertAdjacentHTML: (_, text) => { drawn[id] = text; }})};
new Function("document", scripts)(document);
console.log(JSON.stringify(drawn));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of `dvc plots show` in a DVC project that has only the plots of this one."""
    root = tmp_path_factory.mktemp("plots")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=root, check=True)
    shutil.copy(REPO / ".dvc/config", root / ".dvc/config")
    shutil.copytree(REPO / ".dvc/plots", root / ".dvc/plots")
    plots = yaml.safe_load((REPO / "dvc.yaml").read_text())["plots"]
    (root / "dvc.yaml").write_text(yaml.safe_dump({"plots": plots}, sort_keys=False))
    (root / "reports/plots").mkdir(parents=True)
    for name, text in FILES.items():
        (root / "reports/plots" / name).write_text(text)
    subprocess.run([*dvc, "plots", "show"], cwd=root, check=True, capture_output=True)
    return root / "dvc_plots/index.html"


@pytest.mark.slow
def test_the_page_of_plots_makes_no_outside_request(page):
    text = page.read_text()
    assert re.findall(r"""(?:src|href)\s*=\s*["']""", text) == []
    assert "default-src 'none'" in text
    assert "{plot_divs}" not in text
    assert "<DVC_" not in text
    specs = [json.loads(spec) for spec in re.findall(r"var spec = (\{.*\});", text)]
    assert len(specs) == 8
    assert {spec["usermeta"]["draw"] for spec in specs} == {"bars", "lines", "matrix"}


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_every_plot_is_drawn_with_a_colour_per_loss_and_no_empty_rows(page):
    done = subprocess.run(["node", "-e", DRAW, str(page)], capture_output=True, text=True, check=True)
    drawn = json.loads(done.stdout)
    assert len(drawn) == 8
    assert not re.search("NaN|undefined", done.stdout)
    losses = drawn["#Losses_of_stage_1"]
    assert len(set(re.findall(r'<polyline fill="none" stroke="(#\w+)"', losses))) == 3
    bars = drawn["#Accuracy_by_attribute"]
    assert bars.count("<rect") == 1  # not of the attribute without a value
    assert "&#60;b&#62;" in bars
    assert drawn["#Digits_that_captions_confuse"].count("<td") == 2 * 3
