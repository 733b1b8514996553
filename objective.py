"""A small arithmetic of named numbers, such as ppl*groups**2, evaluated without `eval`."""

import ast
import math
import operator

from config import UserError

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


class Objective:
    """The value of an expression of + - * / **, numbers, brackets and `names`. Raises UserError for anything else."""

    def __init__(self, text: str, names: tuple[str, ...]):
        self.text, self.names = text, names
        if len(text) > 1000:
            raise self.error("is too long")
        try:
            self.tree = ast.parse(text, mode="eval").body
            used = {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self.error("cannot be read") from None
        if not used:
            raise self.error("names nothing that a grouping changes")
        for size in (math.e, 1e4, 1e8):  # it need not make sense for all, but for some
            try:
                self(**dict.fromkeys(names, size))
                break
            except UserError as error:
                problem = error
        else:
            raise problem

    def error(self, reason: str) -> UserError:
        return UserError(
            f"--objective {self.text[:80]!r} {reason}: use {', '.join(self.names)}, numbers and + - * / ** ( )"
        )

    def __call__(self, **values: float) -> float:
        """Raises UserError where it is no finite number."""
        try:
            value = self.value(self.tree, values)
        except (OverflowError, ZeroDivisionError):
            value = math.nan
        if isinstance(value, complex) or not math.isfinite(value):
            raise self.error("is no number at " + ", ".join(f"{name} {values[name]:.6g}" for name in self.names))
        return value

    def value(self, node: ast.expr, values: dict[str, float]) -> float:
        match node:
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](self.value(left, values), self.value(right, values))
            case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](self.value(operand, values))
            case ast.Constant(number) if type(number) in (int, float):
                return float(number)  # 9**9**9 of integers would not end
            case ast.Name(name) if name in self.names:
                return values[name]
        raise self.error(f"has {ast.unparse(node)!r}")
