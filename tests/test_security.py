"""What the source must never contain."""

import ast
import inspect

import app as kyc

SOURCE = ast.parse(inspect.getsource(kyc))
WORDS = ("SELECT ", "INSERT ", "UPDATE ", "DELETE ", "PRAGMA ", "BEGIN")
PASSED_ON = {"statement", "query"}  # arguments, and what relink loops over
SCHEMA = "'BEGIN IMMEDIATE;' + schema + 'COMMIT;'", "SCHEMA.read_text()"  # the file, whole


def executed():
    """Return what is given to SQLite as SQL."""
    methods = ("execute", "executemany", "executescript")
    calls = [node for node in ast.walk(SOURCE) if isinstance(node, ast.Call)]
    return [call.args[0] for call in calls if getattr(call.func, "attr", None) in methods]


def values(name):
    """Return what is assigned to a name, anywhere."""
    assignments = [node for node in ast.walk(SOURCE) if isinstance(node, ast.Assign)]
    return [node.value for node in assignments if ast.unparse(node.targets[0]) == name]


def test_every_statement_is_a_constant():
    statements = [node for node in executed() if ast.unparse(node) not in SCHEMA]
    names = {node.id for node in statements if isinstance(node, ast.Name)}
    assert len(statements) > 30
    assert len(names) > 10
    assert {type(node) for node in statements} == {ast.Constant, ast.Name}
    for name in names:
        assert name in PASSED_ON or values(name), name
        assert {type(value) for value in values(name)} <= {ast.Constant}, name


def test_no_sql_is_built_from_text():
    built = (ast.JoinedStr, ast.BinOp)
    texts = [ast.unparse(node) for node in ast.walk(SOURCE) if isinstance(node, built)]
    suspects = [text for text in texts if any(word in text for word in WORDS)]
    assert suspects == [SCHEMA[0], "'BEGIN IMMEDIATE;' + schema"]
