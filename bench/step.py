"""One contestant of bench/train_step.py, in a process of its own: ``step.py CONTESTANT --numbers JSON --batch N ...``.

Runs in Patchmill's environment or in the peers'; so what only one of them has is imported by the function that needs
it. All do the same work: a Vision Transformer with a class token, GELU by its tanh approximation, softmax loss, AdamW.
For each line of stdin, a number of steps, it takes so many and prints {"seconds": ..., "peak MB": ...} as JSON: memory
above what the imports hold on the CPU, and of all tensors on a GPU, where it keeps none between two lines, and takes it
again by one more step that is not measured. ``matmul`` multiplies two square matrices, in
the fastest way that our models know.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from timeit import timeit

import torch
import torch._dynamo  # making an optimizer would import it, after memory is read
import torch.nn.functional as F  # noqa: N812
from common import memory
from torch import nn

CLASSES = 1000
SIDES = {"cpu": 4096, "cuda": 8192}  # of the square matrices


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=["matmul", *CONTESTANTS])
    parser.add_argument("--numbers", type=json.loads, required=True, help="of the model, as create_model names them")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.precision)
    torch.manual_seed(0)
    if args.contestant == "matmul":
        from pipeline.ceiling import products

        a, b = (torch.randn(SIDES[device.type], SIDES[device.type], dtype=dtype, device=device) for _ in range(2))
        multiply = min(products(device, args.precision), key=lambda each: timeit(lambda: each(a, b), number=2))
        serve(device, lambda: multiply(a, b), 0.0)
        return
    model, optimizer_of = CONTESTANTS[args.contestant](args.numbers)
    imported = memory("VmRSS") - sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    model.to(device).train()
    optimizer = optimizer_of(model)
    run = model
    if args.compile and args.contestant == "patchmill":
        from pipeline.config import EngineSettings
        from pipeline.engines.blocks import prepare_blocks

        prepare_blocks(model, EngineSettings(compile=True))  # as a stage does: block by block
    elif args.compile:
        run = torch.compile(model)
    side = args.numbers["image_size"]
    images = torch.randn(args.batch, 3, side, side, device=device)
    labels = torch.randint(0, CLASSES, (args.batch,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = run(images)
        logits = found if isinstance(found, torch.Tensor) else found.logits
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    serve(device, step, imported)


def serve(device: torch.device, step: Callable[[], object], imported: float) -> None:
    """Take as many steps as each line of stdin says, and print how long they took and the memory they needed."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for line in sys.stdin:
        if on_gpu:
            step()  # takes its memory again
        wait()
        began = perf_counter()
        for _ in range(int(line)):
            step()
        wait()
        seconds = perf_counter() - began
        peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else memory("VmHWM") - imported
        if on_gpu:
            torch.cuda.empty_cache()  # for whoever comes next
        print(json.dumps({"seconds": seconds, "peak MB": peak, "torch": torch.__version__}), flush=True)


def patchmill(numbers: dict) -> tuple[nn.Module, Callable]:
    """Our model, and the optimizer that its settings make."""
    from pipeline.config import OptimSettings
    from pipeline.models import create_model
    from pipeline.optim import create_optimizer, parameter_groups, set_rate

    settings = OptimSettings(weight_decay=0.1)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = create_optimizer(parameter_groups(model.named_parameters(), settings), settings)
        set_rate(optimizer, 1e-4)
        return optimizer

    return create_model("vit_b16", **numbers, num_classes=CLASSES, gelu="tanh"), optimizer_of


def timm(numbers: dict) -> tuple[nn.Module, Callable]:
    """The model of timm."""
    sys.path.append(str(Path(__file__).parents[1] / "tests/peers"))
    from read import torchvision_without_operators

    torchvision_without_operators()
    from timm.models.vision_transformer import VisionTransformer

    numbers = dict(numbers)
    size = numbers.pop("image_size")
    return VisionTransformer(img_size=size, **numbers, num_classes=CLASSES, act_layer="gelu_tanh"), adamw


def transformers(numbers: dict) -> tuple[nn.Module, Callable]:
    """The model of Hugging Face's transformers."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=numbers["image_size"], patch_size=numbers["patch_size"], hidden_size=numbers["embed_dim"],
        num_hidden_layers=numbers["depth"], num_attention_heads=numbers["num_heads"], num_labels=CLASSES,
        intermediate_size=4 * numbers["embed_dim"], hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return ViTForImageClassification(config), adamw


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same optimizer as ours."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)


CONTESTANTS = {"patchmill": patchmill, "timm": timm, "transformers": transformers}

if __name__ == "__main__":
    main()
