"""Directories of stock DeepSpeed, against the masters that it had.

Those that it saved on two ranks are slow to make; others are made here, after the same layout.
"""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file

from pipeline.convert.convert import convert
from pipeline.convert.deepspeed_zero import is_zero, of_zero
from pipeline.convert.recognise import open_source
from pipeline.models import create_model
from shards.errors import UserError
from tests.pipeline.convert.made import ODD, randomized
from tests.ranks import run_on_ranks

WORKER = Path(__file__).with_name("worker_zero.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """What DeepSpeed saved on two ranks."""
    folder = tmp_path_factory.mktemp("zero")
    run_on_ranks(WORKER, 2, folder, 1, 2, 3, timeout=250)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The same, made here, of three ranks."""
    folder = tmp_path_factory.mktemp("made")
    for stage in (1, 2, 3):
        make(folder / str(stage), stage)
    return folder


def make(folder: Path, stage: int, ranks: int = 3) -> None:
    """Write what DeepSpeed would, of a model with a frozen parameter, a shared one and two buffers."""
    masters = {name: value.clone() for name, value in randomized(**ODD).state_dict().items()}
    alias, real = "blocks.1.mlp.fc1.bias", "blocks.0.mlp.fc1.bias"
    masters[alias] = masters[real]
    masters["scale"] = torch.full((3,), 2.0)
    masters["pos_embed"] = masters["pos_embed"].bfloat16().float()
    (folder / "global_step2").mkdir(parents=True)
    save_file({name: value.clone() for name, value in masters.items()}, folder / "masters.safetensors")
    (folder / "latest").write_text("global_step2")
    trained = {name: value for name, value in masters.items() if name not in ("pos_embed", "scale", alias)}
    groups = [{n: v for n, v in trained.items() if v.dim() > 1}, {n: v for n, v in trained.items() if v.dim() < 2}]
    for rank in range(ranks):
        half = {name: value.bfloat16() for name, value in masters.items()}
        model = {"module": half, "buffer_names": ["scale", "places"], "shared_params": {alias: real}}
        model["param_shapes"] = [{name: value.shape for name, value in group.items()} for group in groups]
        state = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks, ranks]}
        if stage == 3:
            parts = [cut(value, ranks)[rank] for group in groups for value in group.values()]
            flat = torch.cat(parts)
            state["fp32_flat_groups"] = list(flat.split(len(flat) // 3 + 1))  # in the middle of parameters
            model["frozen_param_shapes"] = {"pos_embed": masters["pos_embed"].shape}
            model["frozen_param_fragments"] = {"pos_embed": cut(half["pos_embed"], ranks)[rank]}
            model["module"] = {name: value if name == "scale" else value[:0] for name, value in half.items()}
        else:
            flats = [torch.cat([value.flatten() for value in group.values()]) for group in groups]
            state["single_partition_of_fp32_groups"] = [  # the last rank's without what it was padded with
                flat[rank * -(-len(flat) // ranks) :][: -(-len(flat) // ranks)].clone() for flat in flats
            ]
        model["module"]["places"] = torch.arange(3)  # of no use to anybody else
        names = ["mp_rank_00"] if stage < 3 else [f"zero_pp_rank_{rank}_mp_rank_00"]
        if stage == 3 or rank == 0:
            torch.save(model, folder / "global_step2" / f"{names[0]}_model_states.pt")
        optimizer = folder / "global_step2" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"}, optimizer)


def cut(value: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    size = -(-value.numel() // ranks)
    return [part.clone() for part in F.pad(value.flatten(), (0, size * ranks - value.numel())).split(size)]


STAGES = [("made", stage) for stage in (1, 2, 3)]
STAGES += [pytest.param("saved", stage, marks=pytest.mark.slow) for stage in (1, 2, 3)]


@pytest.mark.parametrize(("maker", "stage"), STAGES)
def test_every_parameter_is_its_master_to_the_bit(maker, stage, request):
    folder = request.getfixturevalue(maker) / str(stage)
    masters = load_file(folder / "masters.safetensors")
    tensors = of_zero(is_zero(folder))
    assert tensors.shapes == {name: tuple(value.shape) for name, value in masters.items()}
    unrounded = 0
    for name, value in masters.items():
        assert tensors.read(name).float().equal(value), name
        unrounded += not value.equal(value.bfloat16().float())
    assert unrounded > 20, "masters that bfloat16 holds would prove nothing"


@pytest.mark.parametrize(("maker", "stage"), STAGES)
def test_a_directory_converts(maker, stage, tmp_path, request):
    folder = request.getfixturevalue(maker) / str(stage)
    masters = load_file(folder / "masters.safetensors")
    folder = shutil.copytree(folder, tmp_path / "zero")
    with pytest.raises(UserError, match=r"such as scale \[3\]: it is of another architecture"):
        convert(folder, tmp_path / "w.safetensors", given=["num_heads=3"])
    # Without the buffer, which no model here has.
    first = next(folder.glob("*/*mp_rank_00_model_states.pt"))
    for file in first.parent.glob("*_model_states.pt"):
        state = torch.load(file, weights_only=True)
        del state["module"]["scale"]
        torch.save(state | {"buffer_names": []}, file)
    convert(folder, tmp_path / "w.safetensors", given=["num_heads=3", "gelu=tanh"])
    theirs = create_model(**ODD, seed=None)
    theirs.load_state_dict({name: value for name, value in masters.items() if name != "scale"})
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert open_source(tmp_path / "w.safetensors").build()(images).equal(theirs.eval()(images))


@pytest.mark.parametrize(
    ("stage", "files", "message"),
    [
        (1, "*rank_1*_optim_states.pt", "has 2 files of 3 ranks"),
        (3, "*rank_1*_optim_states.pt", "has 2 files of 3 ranks"),
        (3, "*rank_1*_model_states.pt", "has 2 model files of 3 ranks"),
    ],
)
def test_missing_files_are_told(stage, files, message, made, tmp_path):
    shutil.copytree(made / str(stage), tmp_path / "zero")
    next((tmp_path / "zero").glob(f"*/{files}")).unlink()
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "zero")


def test_files_of_two_checkpoints_and_tensor_parallel_ones_are_refused(made, tmp_path):
    shutil.copytree(made / "1", tmp_path / "zero")
    folder = is_zero(tmp_path / "zero")
    file = next(folder.glob("*rank_1*_optim_states.pt"))
    state = torch.load(file, weights_only=False)
    groups = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = groups[0][:100]
    torch.save(state, file)
    with pytest.raises(UserError, match=r"values for parameters of .* its files are not of one checkpoint"):
        open_source(tmp_path / "zero")
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    with pytest.raises(UserError, match="was made with tensor parallelism"):
        open_source(tmp_path / "zero")


def test_a_rank_that_is_there_twice_in_the_place_of_another_is_told(made, tmp_path):
    shutil.copytree(made / "3", tmp_path / "zero")
    file = next((tmp_path / "zero").glob("*/*rank_1*_optim_states.pt"))
    file.rename(file.with_name(file.name.replace("rank_1", "rank_3")))
    with pytest.raises(UserError, match="has no file of rank 1 beside bf16_zero_pp_rank_2_"):
        open_source(tmp_path / "zero")
    (tmp_path / "zero").rename(tmp_path / "other")
    shutil.copytree(made / "3", tmp_path / "zero")
    file = next((tmp_path / "zero").glob("*/*rank_2*_optim_states.pt"))
    file.rename(file.with_name("zero_pp_rank_1_mp_rank_00_optim_states.pt"))
    with pytest.raises(UserError, match="has two files of rank 1 beside zero_pp_rank_1_"):
        open_source(tmp_path / "zero")


def test_a_rank_of_another_checkpoint_never_gives_other_weights(made, tmp_path):
    """Of stage 3, whose ranks all have vectors of one length: a longer one would have been cut in other places."""
    shutil.copytree(made / "3", tmp_path / "zero")
    file = next((tmp_path / "zero").glob("*/*rank_1*_optim_states.pt"))
    state = torch.load(file, weights_only=True)
    flat = state["optimizer_state_dict"]["fp32_flat_groups"]
    flat[0] = F.pad(flat[0], (3, 0))
    torch.save(state, file)
    with pytest.raises(UserError, match=r"rank_1.* is not of the checkpoint of .*rank_0.*: lengths \["):
        open_source(tmp_path / "zero")


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_nothing_else_is_unpickled(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "1", tmp_path / "zero")
    file = next((tmp_path / "zero").glob("*/mp_rank_00_model_states.pt"))
    torch.save(torch.load(file, weights_only=True) | {"client": _Evil()}, file)
    with pytest.raises(UserError, match="holds more than tensors, and nothing else is unpickled"):
        open_source(tmp_path / "zero")
    assert not (tmp_path / "evil").exists()
