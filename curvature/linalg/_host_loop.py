"""``call_solver``: run a solver compiled, or as an interpreted loop on the host for an operator with ``batches``."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from curvature import _checks
from curvature._compile_cache import call_compiled, compiled_for, is_traced
from curvature.operators._base import LinearOperator
from curvature.operators._data import DataOperator
from curvature.operators._streamed import evaluate_streamed, replace_streamed, streamed_p
from curvature.programs._jaxprs import Environment, called_jaxpr, open_jaxpr, open_loop

# The pieces of each jaxpr that ran on the host; without this cache each call would compile them.
_PIECES: weakref.WeakKeyDictionary[Jaxpr, list["_Piece"]] = weakref.WeakKeyDictionary()


def call_solver(program: Callable[..., Any], op: Any, *operands: Any, **how: Any) -> Any:
    """``program(op, *operands, **how)`` for a public function.

    Outside of transformations the program is compiled once for each structure of the operands. Inside a transformation
    it is traced like any function. With an operator that has ``batches`` it is traced once, and a loop on the host
    interprets the jaxpr; the equations between two passes over the batches are compiled together.
    """
    if not (isinstance(op, LinearOperator) or callable(op)):
        return program(op, *operands, **how)  # raises the error
    replaced, operators = replace_streamed((op, *operands))
    if operators and is_traced():
        raise _checks.no_streaming_inside()
    if operators:
        return _run_on_host(program, replaced, operators, how)
    return program(op, *operands, **how) if is_traced() else call_compiled(program, (op, *operands), how)


def _run_on_host(
    program: Callable[..., Any], operands: tuple[Any, ...], operators: list[DataOperator], how: dict[str, Any]
) -> Any:
    jitted, given, data = compiled_for(program, operands, how)
    try:
        traced = jitted.trace(given, *data)
    finally:
        given.content = None
    outs = _evaluate(traced.jaxpr.jaxpr, traced.jaxpr.consts, list(map(jnp.asarray, data)), operators)
    return jax.tree.structure(traced.out_info).unflatten(outs)


class _Piece(NamedTuple):
    """Several equations without a product, compiled together, or one equation that contains a product.

    Attributes:
        eqn: the equation; None for several.
        ins: the variables and literals that the piece reads.
        outs: the variables that the piece writes.
        body: a compiled function for several equations; the ``Loop`` of a scan, a called jaxpr or None for one.
    """

    eqn: Any
    ins: Sequence[Any]
    outs: Sequence[Any]
    body: Any


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], operators: Sequence[DataOperator]) -> list[Any]:
    """The outputs of a jaxpr in which some equations are products with these operators."""
    env = Environment()
    env.write(jaxpr.constvars, consts)
    env.write(jaxpr.invars, args)
    if jaxpr not in _PIECES:
        _PIECES[jaxpr] = _cut(jaxpr)
    for piece in _PIECES[jaxpr]:
        values = env.read(piece.ins)
        if piece.eqn is None:
            outs = piece.body(*values)
        elif piece.eqn.primitive is streamed_p:
            outs = evaluate_streamed(operators[piece.eqn.params["number"]], values, piece.eqn.params)
        elif piece.eqn.primitive.name in _LOOPS:
            outs = _LOOPS[piece.eqn.primitive.name](piece, values, operators)
        else:
            outs = _evaluate(piece.body, [], values, operators)
        env.write(piece.outs, outs)
    return env.read(jaxpr.outvars)


def _evaluate_closed(closed: Any, args: Sequence[Any], operators: Sequence[DataOperator]) -> list[Any]:
    return _evaluate(open_jaxpr(closed), getattr(closed, "consts", []), args, operators)


def _evaluate_while(piece: _Piece, values: list[Any], operators: Sequence[DataOperator]) -> list[Any]:
    params = piece.eqn.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_cond, of_body, carry = values[:first], values[first:second], values[second:]
    while _evaluate_closed(params["cond_jaxpr"], [*of_cond, *carry], operators)[0]:
        carry = _evaluate_closed(params["body_jaxpr"], [*of_body, *carry], operators)
    return carry


def _evaluate_scan(piece: _Piece, values: list[Any], operators: Sequence[DataOperator]) -> list[Any]:
    loop, params = piece.body, piece.eqn.params
    consts, carry, slices = loop.split(values)
    order = -1 if params["reverse"] else 1
    stacked: list[list[Any]] = [[] for _ in range(len(piece.outs) - loop.num_carry)]
    for i in range(params["length"])[::order]:
        outs = _evaluate_closed(loop.body, [*consts, *carry, *(x[i] for x in slices)], operators)
        carry = outs[: loop.num_carry]
        for rows, out in zip(stacked, outs[loop.num_carry :], strict=True):
            rows.append(out)
    return [*carry, *(jnp.stack(rows[::order]) for rows in stacked)]


def _evaluate_cond(piece: _Piece, values: list[Any], operators: Sequence[DataOperator]) -> list[Any]:
    return _evaluate_closed(piece.eqn.params["branches"][int(values[0])], values[1:], operators)


_LOOPS = {"while": _evaluate_while, "scan": _evaluate_scan, "cond": _evaluate_cond}


def _cut(jaxpr: Jaxpr) -> list[_Piece]:
    """The equations in order: each equation with a product alone, and all equations between two of these together."""
    pieces: list[_Piece] = []
    segment: list[Any] = []
    for i, eqn in enumerate(jaxpr.eqns):
        if not _contains_product(eqn):
            segment.append(eqn)
            continue
        pieces += _compiled_segment(jaxpr, segment, i)
        segment = []
        name = eqn.primitive.name
        body = open_loop(eqn) if name == "scan" else None
        if body is None and name not in _LOOPS and eqn.primitive is not streamed_p:
            body = called_jaxpr(eqn)
            assert body is not None, f"a product inside {name}"
            assert not body.constvars
        pieces.append(_Piece(eqn, eqn.invars, eqn.outvars, body))
    return pieces + _compiled_segment(jaxpr, segment, len(jaxpr.eqns))


def _compiled_segment(jaxpr: Jaxpr, eqns: list[Any], end: int) -> list[_Piece]:
    """The equations before number ``end`` as one compiled function; its outputs are what later equations read."""
    if not eqns:
        return []
    written = {v for eqn in eqns for v in eqn.outvars}
    ins = list(dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, Var) and v not in written))
    later = [v for eqn in jaxpr.eqns[end:] for v in eqn.invars] + list(jaxpr.outvars)
    outs = list(dict.fromkeys(v for v in later if isinstance(v, Var) and v in written))
    segment = jaxpr.replace(
        constvars=[],
        invars=ins,
        outvars=outs,
        eqns=eqns,
        effects=frozenset().union(*(eqn.effects for eqn in eqns)),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return [_Piece(None, ins, outs, jax.jit(jex.core.jaxpr_as_fun(ClosedJaxpr(segment, []))))]


def _contains_product(eqn: Any) -> bool:
    """Whether an equation, or an equation in its bodies, is a product with an operator that has ``batches``."""
    if eqn.primitive is streamed_p:
        return True
    return any(_contains_product(inner) for body in jex.core.jaxprs_in_params(eqn.params) for inner in body.eqns)
