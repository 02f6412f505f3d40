"""Which modules of a model run in forward, and hooks that do not outlive what they call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .. import _torch_private


class Handles(list[Any]):
    """Handles of hooks, which are removed with their owner: dead ones would be called for ever."""

    def remove_all(self) -> None:
        for handle in self:
            handle.remove()
        self.clear()

    __del__ = remove_all


class Hook:
    """A hook on a module or a param that calls back into an optimizer, as long as that lives.

    A copy or a pickle of the module is another module: its hooks do nothing.
    """

    def __init__(self, call: Callable[..., None] | None, index: int) -> None:
        self._call = None if call is None else weakref.WeakMethod(call)
        self._index = index

    def __call__(self, owner: Any, *_: Any) -> None:
        self._give(owner, self._index)

    def _give(self, *args: Any) -> None:
        call = None if self._call is None else self._call()
        if call is not None:
            call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None, self._index)


class OutputHook(Hook):
    """A forward hook on a module that calls back with what it returned; not in compiled code."""

    def __call__(self, owner: Any, *rest: Any) -> None:
        # What is called would break the graph of a compiled module.
        if not torch.compiler.is_compiling():
            self._give(rest[-1])


class _Called:
    """In the place of what a compiled module runs when it is called: a hook before it.

    A forward pre-hook of that module would be compiled with it, or break its graph.
    """

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self._module = weakref.ref(module)
        self._hook = hook
        self._compiled: Any = _torch_private.compiled_call(module)
        _torch_private.set_compiled_call(module, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._hook(self._module())
        return self._compiled(*args, **kwargs)

    def _chain(self) -> list[Any]:
        """What the module runs, from the outside in: other optimizers may have hooks there too."""
        module = self._module()
        chain = [] if module is None else [_torch_private.compiled_call(module)]
        while chain and isinstance(chain[-1], _Called):
            chain.append(chain[-1]._compiled)
        return chain

    def in_place(self) -> bool:
        return self._module() is None or self in self._chain()

    def remove(self) -> None:
        chain, module = self._chain(), self._module()
        if module is None or self not in chain:
            return
        at = chain.index(self)
        if at:
            chain[at - 1]._compiled = self._compiled
        else:
            _torch_private.set_compiled_call(module, self._compiled)


def _is_compiled(module: nn.Module) -> bool:
    """By ``module.compile()``, or as ``torch.compile(module)`` returned it."""
    return _torch_private.is_optimized_module(module) or bool(_torch_private.compiled_call(module))


class ForwardOrder:
    """Which modules of a model run in forward, so that each can wait for what it uses.

    A module uses its own params, and those of modules below it that do not run themselves: their
    parent reads them (``nn.MultiheadAttention`` does). Which ones run is learnt from a forward in
    training, and anew when it changes; until then the first module to run waits for everything.
    Evaluation always does: its fast paths run fewer modules.

    A compiled module (a layer, say) waits for all that it has, before its compiled code runs: a
    hook inside would break its graph.
    """

    def __init__(
        self, model: nn.Module, wait: Callable[[int], None], synchronize: Callable[[], None]
    ) -> None:
        self._wait = weakref.WeakMethod(wait)
        self._synchronize = weakref.WeakMethod(synchronize)
        self._modules = list(model.modules())
        index = {id(m): i for i, m in enumerate(self._modules)}
        #: the params of each module, by id: also frozen ones, which may be trained later
        self.own = [[id(p) for p in m.parameters(recurse=False)] for m in self._modules]
        self._owners = {i for i, own in enumerate(self.own) if own}
        self._parents: list[list[int]] = [[] for _ in self._modules]
        for i, m in enumerate(self._modules):
            for child in m.children():
                self._parents[index[id(child)]].append(i)
        self._ran: set[int] = set()
        #: owners that ran, and what follows from it; None while every module is watched
        self._known: tuple[set[int], dict[int, set[int]]] | None = None
        self._handles: dict[int, Any] = {}
        self._watch(range(len(self._modules)))
        self._others = Handles()
        for i, m in enumerate(self._modules):
            of: Any = m
            hook = Hook(self._before_state_dict, i)
            self._others.append(of.register_state_dict_pre_hook(hook))
            self._others.append(of.register_load_state_dict_pre_hook(hook))

    def remove(self) -> None:
        """All hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}
        self._others.remove_all()

    __del__ = remove

    def _watch(self, chosen: Iterable[int]) -> None:
        """Have these modules report when they run, and no others: each costs the host some us."""
        chosen = set(chosen) - self._inside_compiled()
        for i in self._handles.keys() - chosen:
            self._handles.pop(i).remove()
        for i in chosen - self._handles.keys():
            hook, module = Hook(self._before_forward, i), self._modules[i]
            if _torch_private.compiled_call(module) is None:
                self._handles[i] = module.register_forward_pre_hook(hook)
            else:
                self._handles[i] = _Called(module, hook)

    def _inside_compiled(self) -> set[int]:
        """Modules below a compiled one."""
        inside: set[int] = set()
        for i, parents in enumerate(self._parents):  # parents come before their children
            if any(p in inside or _is_compiled(self._modules[p]) for p in parents):
                inside.add(i)
        return inside

    def _before_forward(self, module: nn.Module, index: int) -> None:
        if torch.compiler.is_compiling():
            # Traced into a graph, this would wait once and never again. The compiler leaves a
            # frame that raises to plain Python, where this is False.
            raise RuntimeError("overlap_gather=True: a wait for params cannot be compiled")
        if not (module.training and torch.is_grad_enabled()):
            self._before_state_dict(module, index)
            return
        self._ran.add(index)
        wait = self._wait()
        if wait is not None:
            wait(index)

    def _before_state_dict(self, module: nn.Module, index: int) -> None:
        synchronize = self._synchronize()
        if synchronize is not None:
            synchronize()

    def needs(self, own: Sequence[set[int]]) -> dict[int, set[int]]:
        """{module: the buckets it waits for} in the next forward, if it goes as the last one."""
        ran, self._ran = self._ran, set()
        called = [h for h in self._handles.values() if isinstance(h, _Called)]
        if not all(h.in_place() for h in called):  # compiled anew since, which lost the hook
            self._known = None
            self._watch([])
        if self._known is None:
            found = {i: set(own[i]) for i in ran}
            for i in self._owners - ran:
                for ancestor in self._running_above(i, ran):
                    found[ancestor] |= own[i]
            self._known = (ran & self._owners, found)
            # The first module that runs in evaluation must see that it is one.
            self._watch(self._owners | {i for i, buckets in found.items() if buckets} | {0})
        elif self._known[0] != ran & self._owners:
            self._known = None
            self._watch(range(len(self._modules)))
            everything = set().union(*own)
            return dict.fromkeys(range(len(self._modules)), everything)
        return self._known[1]

    def _running_above(self, i: int, ran: set[int]) -> set[int]:
        """The nearest modules above i that run."""
        found: set[int] = set()
        for parent in self._parents[i]:
            found |= {parent} if parent in ran else self._running_above(parent, ran)
        return found
