import re

from pipeline.report.run import read_run
from pipeline.report.settings import differences
from tests.pipeline.report.made import made_run, trained

PLAN = '[[stage]]\nname = "one"\nkind = "supervised"\nrecipe = "small_pretrain"\n'


def test_stages_of_one_name_are_compared_run_by_run(tmp_path):
    for name, over in (("a", {}), ("b", {"optim": {"lr": 0.5}}), ("c", {"label_smoothing": 0.1})):
        trained(made_run(tmp_path / name, PLAN), "one", "small_pretrain", 0.5, **over)
    made_run(tmp_path / "d", PLAN.replace("one", "two"))
    trained(tmp_path / "d", "two", "small_pretrain", 0.5, seed=9)
    runs = {name: read_run(tmp_path / name) for name in "abcd"}
    cells = re.findall("<td>(.*?)</td>", differences(runs))
    rate = str(runs["a"].stages["one"].settings["optim"]["lr"])
    assert cells == ["one", "label_smoothing", "0.0", "0.0", "0.1", "–", "one", "optim.lr", rate, "0.5", rate, "–"]
    assert differences({"a": runs["a"], "d": runs["d"]}) == ""
    assert differences({"a": runs["a"]}) == ""
