"""Optimizers by name; another one is a builder, in a file of its own and in `OPTIMIZERS`, or by import name."""

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from .keywords import OF_FSDP
from .muon import AdaMuon, Muon
from .schedule_free import ScheduleFreeAdamW
from .user_functions import load_function

Groups = list[dict[str, Any]]
OptimizerBuilder = Callable[[Groups, TrainingArguments, nn.Module], torch.optim.Optimizer]
"""Takes the groups of parameters, with the weight decay of each, the training arguments and the model."""


def build_optimizer(name: str, groups: Groups, args: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that is registered under a name, or that the function of an import name builds.

    Raises:
        ValueError: The function cannot be found, raises, or returns no optimizer.
    """
    build = OPTIMIZERS.get(name)
    if build is not None:
        return build(groups, args, model)
    build = load_function("optimizer", name, "trainers.optimizers:build_muon")
    try:
        optimizer = build(groups, args, model)
    except Exception as error:  # whatever the code of a user raises
        raise ValueError(f"optimizer {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer {name!r} returned {optimizer!r:.80}; it must return a torch.optim.Optimizer")
    return optimizer


def build_muon(groups: Groups, args: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """Muon at `args.muon_learning_rate` for the matrices inside the layers, and the optimizer of `args.optim` for the
    rest; with DeepSpeed its own, and AdamW for the rest.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with steps of the size that Liu et al. 2025,
    arXiv 2502.16982, give them, so that rates of AdamW and weight decays are of the right order.

    Raises:
        ValueError: The optimizer is not torch's, so that its state may not be loadable by torch's rules.
    """
    if args.deepspeed:
        from .deepspeed_muon import build_zero_muon  # it takes seconds, and is not always there

        return build_zero_muon(groups, args, matrices_of(model))
    return with_auxiliary(groups, args, model, lambda own: Muon(own, lr=args.muon_learning_rate))


def build_adamuon(groups: Groups, args: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """AdaMuon at `args.muon_learning_rate` for the matrices inside the layers, and the optimizer of `args.optim` for
    the rest.

    Raises:
        ValueError: The optimizer is not torch's, so that its state may not be loadable by torch's rules.
    """
    return with_auxiliary(groups, args, model, lambda own: AdaMuon(own, lr=args.muon_learning_rate))


def build_schedule_free(groups: Groups, args: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """Schedule-free AdamW, whose weights are an average of all steps, so that the rate need not fall."""
    betas = (args.adam_beta1, args.adam_beta2)
    return CombinedOptimizer(ScheduleFreeAdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon))


def build_soap(groups: Groups, args: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioners, which are renewed
    every ten steps; the package pytorch-optimizer has it. The authors take 0.95 for both betas.

    Raises:
        ValueError: The package is not installed.
    """
    if importlib.util.find_spec("pytorch_optimizer") is None:
        raise ValueError("optimizer is 'soap', which the package pytorch-optimizer has; pip install pytorch-optimizer")
    from pytorch_optimizer import SOAP  # it takes a second

    betas = (args.adam_beta1, args.adam_beta2)
    return CombinedOptimizer(SOAP(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon))


OPTIMIZERS: dict[str, OptimizerBuilder] = {
    "muon": build_muon,
    "adamuon": build_adamuon,
    "schedule_free": build_schedule_free,
    "soap": build_soap,
}
STATE_BYTES = {"muon": 4, "adamuon": 8, "schedule_free": 12, "soap": 8}
"""Bytes of the state of a weight; SOAP has square matrices besides, of the sides that are not too long for it."""
MOST_OF_SOAP = 10_000
FOR_MATRICES = ("muon", "adamuon")
"""Those that train the matrices inside the layers at `muon_learning_rate`, beside another one for the rest."""
ZERO_STAGES = {"muon": (1, 2, 3)}
"""Stages of ZeRO that an optimizer of a name runs under. Those of `optim`, and functions of one's own, are not refused:
they get what a stage leaves of the parameters."""


def check_distribution(args: TrainingArguments, zero: Mapping[str, Any] | None, is_fsdp: bool) -> None:
    """The one place that knows which optimizers and gradient filters run under what. All run in one process and on the
    ranks of DDP.

    Args:
        args: Those of a run, with `optimizer_name`.
        zero: What DeepSpeed's file says of ZeRO; None without DeepSpeed.
        is_fsdp: Whether FSDP divides the weights.

    Raises:
        ValueError: These do not run together.
    """
    if args.fp16 and args.gradient_filter.name is not None:
        raise ValueError(
            f"training.gradient_filter.name is {args.gradient_filter.name!r}, but with fp16 fused optimizers also step "
            "where a gradient overflowed, which would stay in its average; set bf16 in place of fp16, or it to null"
        )
    where = "FSDP" if is_fsdp else None if zero is None else f"ZeRO-{zero.get('stage', 0)}"
    if where is None:
        return
    if args.gradient_filter.name is not None:
        raise ValueError(
            f"training.gradient_filter.name is {args.gradient_filter.name!r}, but {where} keeps gradients where a "
            "filter cannot reach them; set it to null, or take DDP"
        )
    name = args.optimizer_name
    if name in OPTIMIZERS and (is_fsdp or zero.get("stage", 0) not in ZERO_STAGES.get(name, ())):
        raise ValueError(
            f"training.optimizer is {name!r}, which does not run under {where}: it needs whole matrices or weights; "
            + ("take ZeRO-1, -2 or -3, DDP, " if name in ZERO_STAGES else "take DDP, ")
            + "or an optimizer of training.optim"
        )
    if is_fsdp:
        if name is None and (optim := OptimizerNames(args.optim).value) not in OF_FSDP:
            raise ValueError(
                f"training.optim is {optim!r}, which cannot compute with the parts of weights that FSDP leaves on each "
                "rank; take adamw_torch, or DDP or ZeRO"
            )
        return
    if name in OPTIMIZERS and "offload_optimizer" in zero:
        raise ValueError(
            f"training.optimizer is {name!r}, which does not run with offload_optimizer of DeepSpeed's file; take it "
            "out there, or take an optimizer of training.optim"
        )
    if name in OPTIMIZERS and args.max_grad_norm:
        raise ValueError(
            f"training.max_grad_norm is {args.max_grad_norm}, but under {where} DeepSpeed would clip Muon's updates in "
            "place of gradients; set it to 0"
        )
    if name in OPTIMIZERS and args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(
            f"training.optim is {OptimizerNames(args.optim).value}, but DeepSpeed's Muon trains all but matrices with "
            "AdamW; leave it out"
        )


def bytes_of_states(args: TrainingArguments, model: nn.Module) -> int:
    """Bytes that the optimizer, the gradient filter and the average of the weights keep of a model, about: unknown
    optimizers are taken for AdamW, and of functions of one's own nothing is known.
    """
    name, auxiliary = args.optimizer_name, bytes_of_optim(OptimizerNames(args.optim).value)
    filtering = args.gradient_filter
    matrices = set(matrices_of(model)) if name in FOR_MATRICES else set()
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_own = name in STATE_BYTES and (name not in FOR_MATRICES or parameter in matrices)
        total += parameter.numel() * (STATE_BYTES[name] if is_own else auxiliary)
        if name == "soap" and parameter.ndim > 1:
            total += 8 * sum(side**2 for side in parameter.shape if side <= MOST_OF_SOAP)
        total += parameter.numel() * {None: 0, "ema": 4}.get(filtering.name, 4 * (filtering.window + 1))
        total += parameter.nbytes if args.ema_decay else 0
    return total


def bytes_of_optim(name: str) -> int:
    """Bytes of the state of a weight, by the name that transformers has for an optimizer."""
    num_moments = {"sgd": 0, "adafactor": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "ademamix": 3}
    moments = next((count for kind, count in num_moments.items() if kind in name), 2)
    return moments * (1 if "8bit" in name or "4bit" in name else 4)


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers that learn, but for the output head, which like an embedding has a row per token."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return list(dict.fromkeys(module.weight for module in linear if module.weight.requires_grad))


def with_auxiliary(
    groups: Groups, args: TrainingArguments, model: nn.Module, build: Callable[[Groups], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """The optimizer that `build` makes of the matrices inside the layers, and that of `args.optim` for the rest.

    Raises:
        ValueError: The latter is not torch's, so that its state may not be loadable by torch's rules.
    """
    auxiliary, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not auxiliary.__module__.startswith("torch.optim."):
        raise ValueError(
            f"training.optim makes a {auxiliary.__name__}, but beside muon_learning_rate it has to be one of "
            "torch's: adamw_torch, adamw_torch_fused, sgd, adagrad or rmsprop"
        )
    return combine(auxiliary(groups, **options), matrices_of(model), build)


def combine(
    rest: torch.optim.Optimizer, matrices: list[nn.Parameter], build: Callable[[Groups], torch.optim.Optimizer]
) -> "CombinedOptimizer":
    """An optimizer that has not made a step yet, beside one that `build` makes of some of its parameters."""
    chosen, own = set(matrices), []
    for options in rest.param_groups:
        members = [parameter for parameter in options["params"] if parameter in chosen]
        options["params"] = [parameter for parameter in options["params"] if parameter not in chosen]
        own += [{"params": members, "weight_decay": options["weight_decay"]}] if members else []
    return CombinedOptimizer(rest, build(own))


REMAINDER = "remainder"


class CombinedOptimizer(torch.optim.Optimizer):
    """One or two optimizers with one list of groups and one state, so that schedules, checkpoints and resuming are
    those of any optimizer. All states are float32: of weights and gradients of fewer bits, an optimizer gets float32
    copies for the time of a step, and the new weights are cast. What that rounds off is kept, in as many bits, as
    `remainder` in the state, or updates of less than the last bit would never add up.

    Args:
        rest: An optimizer that has not made a step yet.
        matrices: Another one, of other parameters.
    """

    def __init__(self, rest: torch.optim.Optimizer, matrices: torch.optim.Optimizer | None = None):
        self.parts = {False: rest} if matrices is None else {False: rest, True: matrices}
        groups = [
            {**options, "is_muon": is_muon}  # the key that checkpoints have
            for is_muon, part in self.parts.items()
            for options in part.param_groups
            if options["params"]
        ]
        super().__init__(groups, {})

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step of each; the loss of the closure, where there is one."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._supplied_parts():
            with in_float32(part):
                part.step()
            self.state = part.state
        return loss

    def train(self) -> None:
        """Give the weights what gradients are taken at, where that differs from what is evaluated."""
        for part in self._supplied_parts():
            if isinstance(part, ScheduleFreeAdamW):
                part.train()

    def eval(self) -> None:
        """Give the weights what is evaluated and saved."""
        for part in self._supplied_parts():
            if isinstance(part, ScheduleFreeAdamW):
                part.eval()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also keeps the state in float32; torch would cast it to the dtype of the weights. A state of one optimizer of
        torch's, as runs of 16 bits once had it, is that of the only one here.
        """
        groups = [{"is_muon": False, **group} for group in state_dict["param_groups"]]
        state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        here = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, here, strict=True):
            if is_low(parameter) and key in state_dict["state"]:
                state = send_to_device(state_dict["state"][key], parameter.device)
                self.state[parameter] = {
                    name: value.float() if name != REMAINDER and is_low(value) else value
                    for name, value in state.items()
                }

    def _supplied_parts(self) -> Iterator[torch.optim.Optimizer]:
        """The optimizers, with their groups and the state, which loading a checkpoint and dividing groups replace."""
        for is_muon, part in self.parts.items():
            part.param_groups = [options for options in self.param_groups if options["is_muon"] == is_muon]
            part.state = self.state
            yield part


def is_low(value: Any) -> bool:
    """Whether it is a tensor whose numbers have fewer bits than those of float32."""
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def keeps_low_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of torch's, whose state has the dtype of the weights, and some have fewer bits than float32."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return type(optimizer).__module__.startswith("torch.optim.") and any(map(is_low, parameters))


@contextmanager
@torch.no_grad()
def in_float32(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A context in which an optimizer has float32 copies of weights of fewer bits and of their gradients; what it has
    made of the copies is cast when the context ends, and the remainder kept for the next.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    copies = {it: nn.Parameter(it.float()) for it in parameters if is_low(it) and it.grad is not None}
    for parameter, copy in copies.items():
        copy.grad = parameter.grad.float()
        copy.add_(optimizer.state[parameter].pop(REMAINDER, 0.0))
    exchange(optimizer, copies)
    try:
        yield
    finally:
        exchange(optimizer, {copy: parameter for parameter, copy in copies.items()})
    for parameter, copy in copies.items():
        parameter.copy_(copy)
        optimizer.state[parameter][REMAINDER] = copy.sub_(parameter).to(parameter.dtype)


def exchange(optimizer: torch.optim.Optimizer, others: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Put other parameters into the places that an optimizer has for some."""
    if others:
        for group in optimizer.param_groups:
            group["params"] = [others.get(parameter, parameter) for parameter in group["params"]]
        state = {others.get(parameter, parameter): value for parameter, value in optimizer.state.items()}
        optimizer.state = defaultdict(dict, state)
