"""What the source must never contain."""

import ast
import inspect

import app as kyc

SOURCE = ast.parse(inspect.getsource(kyc))


def calls(*names):
    """Yield the calls of methods with these names."""
    for node in ast.walk(SOURCE):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in names:
            yield node


def test_no_sql_is_built_from_strings():
    statements = [call.args[0] for call in calls("execute", "executemany")]
    assert len(statements) > 30
    kinds = {type(statement) for statement in statements}
    assert kinds == {ast.Constant, ast.Name}
    built = (ast.JoinedStr, ast.BinOp)
    texts = [node for node in ast.walk(SOURCE) if isinstance(node, ast.JoinedStr)]
    words = ("SELECT ", "INSERT ", "UPDATE ", "DELETE ", "PRAGMA ")
    assert not [node for node in texts if any(word in ast.unparse(node) for word in words)]
    assert not any(isinstance(statement, built) for statement in statements)
