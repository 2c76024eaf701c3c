"""Programmatic dependent launch: a launch that may begin before the previous one in its stream has ended."""

from __future__ import annotations

from collections.abc import Callable

from .groups import Group
from .module import Instruction, PtxError
from .operands import binds


@binds("griddepcontrol")
def _griddepcontrol(machine, instruction: Instruction) -> Callable:
    if instruction.modifiers == ("wait",):

        def wait(group: Group) -> None:
            machine.waited[group.lanes] = True

        return wait
    if instruction.modifiers != ("launch_dependents",):
        raise PtxError("unknown form")

    def allow(group: Group) -> None:
        # The launches before the previous one have ended only then, and the next launch relies on that.
        if not machine.waited[group.lanes].all():
            raise machine.fault(group, int(group.lanes[0]), "lets the next launch begin before griddepcontrol.wait")

    return allow
