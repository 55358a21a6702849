"""What a pair keeps from one run to the next outside its parameters: found, compared, and put back.

That is the attributes of its modules, lists, dicts and sets in them, what its functions close over or name of the
variables of their file, and random states. What lies deeper, in objects of other classes, is not seen.
"""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, torch.Size, type(None))
GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
CONTAINERS = (dict, list, set, deque)
OF_TORCH = ("_parameters", "_buffers", "_modules")  # where a module has what it shows as attributes
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@dataclass(frozen=True)
class Variable:
    """One variable of the file of a function."""

    variables: dict[str, Any]
    name: str


class Kept:
    """All that a pair keeps, as it is now.

    Args:
        modules: all that the pair has registered; a graph may change their buffers in place.
        programs: functions and methods of the pair.
        device: whose random state is meant, beside that of the CPU.
        with_values: whether tensors are copied, so that they can be put back.
    """

    def __init__(
        self, modules: nn.Module, programs: tuple[object, ...], device: torch.device, with_values: bool = True
    ) -> None:
        self.places: list[tuple[str, Any, Any]] = []  # name, what it is, what was in it
        self.tensors: list[tuple[str, Tensor, int, Tensor | None]] = []  # the number of changes in place, a copy
        self.with_values, self.seen = with_values, set[int]()
        self.inputs = {id(each) for each in (*modules.parameters(), *modules.buffers())}
        # The generators behind the functions of both modules, which no type stub knows of.
        self._note("the random state of Python", random.getstate.__self__)  # type: ignore[attr-defined]
        self._note("the random state of numpy", np.random.get_state.__self__)  # type: ignore[attr-defined]
        self.noise = [torch.default_generator]  # which a graph moves as the pair does
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.noise.append(torch.cuda.default_generators[index])
        self.noise_before = [each.get_state() for each in self.noise]
        self.seen |= {id(each) for each in self.noise}
        for each in (modules, *programs):
            self._look(getattr(each, "__qualname__", type(each).__name__), each)

    def changed(self) -> list[str]:
        """Names of what is not as it was, where a graph would have left it so."""
        found = {each for name, place, before in self.places for each in _differences(name, place, before)}
        found |= {name for name, value, version, _ in self.tensors if version != self._version(value)}
        return sorted(found)

    @torch.no_grad()
    def put_back(self) -> None:
        """All is as it was, and in the places where it was."""
        for _, place, before in self.places:
            if not _is_same(_read(place), before):
                _write(place, before)
        for _, value, _, copy in self.tensors:
            if copy is not None and not torch.equal(value, copy):
                value.detach().copy_(copy)
        for generator, state in zip(self.noise, self.noise_before, strict=True):
            generator.set_state(state)

    def _look(self, name: str, value: Any) -> None:
        """Note what there is to `value`, and look into it."""
        if isinstance(value, PLAIN):
            return
        if isinstance(value, tuple):
            for each in value:
                self._look(name, each)
            return
        if isinstance(value, MethodType):
            self._look(name, value.__func__)
            own = value.__self__
            self._look(name, own if isinstance(own, nn.Module) else getattr(own, "__dict__", None))
            return
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        if isinstance(value, nn.Module):
            self._look(type(value).__name__, vars(value))
            self._look(f"{type(value).__name__}.forward", type(value).forward)
        elif isinstance(value, FunctionType):
            self._look_into(value)
        elif isinstance(value, CONTAINERS):
            self._note(name, value)
            for key, each in value.items() if isinstance(value, dict) else ((None, each) for each in value):
                self._look(name if key is None or key in OF_TORCH else f"{name}.{key}", each)
        elif isinstance(value, Tensor):
            copy = value.detach().clone() if self.with_values else None
            self.tensors.append((name, value, self._version(value), copy))
        elif isinstance(value, (np.ndarray, *GENERATORS)):
            self._note(name, value)

    def _look_into(self, function: FunctionType) -> None:
        """What a function closes over, and the variables of its file that it names."""
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._note(f"{variable} of {function.__qualname__}", cell)
            for each in _read(cell):
                self._look(f"{variable} of {function.__qualname__}", each)
        if str(function.__module__).split(".")[0] in ("torch", "pyro"):
            return  # whose files hold settings of the whole process
        for variable in function.__code__.co_names:
            value = function.__globals__.get(variable)
            if isinstance(value, (*PLAIN, *CONTAINERS, *GENERATORS, Tensor, np.ndarray)) and value is not None:
                self._note(f"{variable} of {function.__qualname__}", Variable(function.__globals__, variable))
                self._look(f"{variable} of {function.__qualname__}", value)

    def _note(self, name: str, place: Any) -> None:
        self.places.append((name, place, _read(place)))

    def _version(self, value: Tensor) -> int:
        """How often a tensor was changed in place; nothing for what is an input of graphs, which do the same."""
        return 0 if id(value) in self.inputs or value.is_inference() else value._version


def hooks(modules: nn.Module) -> list[str]:
    """Classes of modules, and names of parameters, with hooks of the user's: Python that a graph would not call."""
    found: dict[str, None] = {}
    for module in modules.modules():
        for hook in (hook for name in HOOKS for hook in getattr(module, name, {}).values()):
            if not str(getattr(hook, "__module__", "")).startswith("torch."):  # torch's own are tensor operations
                found[type(module).__name__] = None
    for path, parameter in modules.named_parameters():
        if any(getattr(parameter, name, None) for name in PARAMETER_HOOKS):
            found[path.split(".", 1)[-1]] = None
    return list(found)


def _read(place: Any) -> Any:
    """A copy of what is in it, as far as it goes: the things themselves are not copied."""
    if isinstance(place, dict):
        return dict(place)
    if isinstance(place, set):
        return set(place)
    if isinstance(place, list | deque):
        return list(place)
    if isinstance(place, Variable):
        return [place.variables[place.name]] if place.name in place.variables else []
    if isinstance(place, CellType):
        try:
            return [place.cell_contents]
        except ValueError:  # a variable that has no value yet
            return []
    if isinstance(place, np.ndarray):
        return place.copy()
    if isinstance(place, np.random.Generator):
        return place.bit_generator.state
    if isinstance(place, torch.Generator):
        return place.get_state().numpy().tobytes()
    return place.getstate() if isinstance(place, random.Random) else place.get_state()


def _write(place: Any, before: Any) -> None:
    if isinstance(place, dict | set):
        place.clear()
        place.update(before)
    elif isinstance(place, list | deque):
        place.clear()
        place.extend(before)
    elif isinstance(place, Variable):
        place.variables.update(zip((place.name,), before, strict=False))
    elif isinstance(place, CellType):
        for each in before:
            place.cell_contents = each
    elif isinstance(place, np.ndarray):
        place[...] = before
    elif isinstance(place, np.random.Generator):
        place.bit_generator.state = before
    elif isinstance(place, torch.Generator):
        place.set_state(torch.frombuffer(bytearray(before), dtype=torch.uint8))
    elif isinstance(place, random.Random):
        place.setstate(before)
    else:
        place.set_state(before)


def _differences(name: str, place: Any, before: Any) -> Iterator[str]:
    now = _read(place)
    if not isinstance(place, dict):
        yield from () if _is_same(now, before) else (name,)
        return
    for key in {**before, **now}:
        # What Pyro's transforms keep is from a draw to its density, in one run.
        if not (str(key).startswith("_cached") and "_cache_size" in before):
            is_same = key in now and key in before and _is_same(now[key], before[key])
            yield from () if is_same else (f"{name}.{key}",)


def _is_same(now: Any, before: Any) -> bool:
    """The very same object, or numbers and words that are equal; a tensor that is made anew is another one."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, np.ndarray):
        return now.tobytes() == before.tobytes()
    if isinstance(now, dict):
        return list(now) == list(before) and all(map(_is_same, now.values(), before.values()))
    if isinstance(now, list | tuple):
        return len(now) == len(before) and all(map(_is_same, now, before))
    return bool(now == before) if isinstance(now, (*PLAIN, set)) else False
