"""
The measure of the house, held with `ast` alone: how long, how dense and how tangled our three
programs may be, what no line of them does, and what lies at the top of the repository.

    pytest tests/test_house.py -s      # prints the figures

Lines alone would reward density: a program can be typed into half of its lines and be read by
nobody. AST nodes a statement measure that. Model code bases have 9 to 13 of them. A compound
statement counts without its body.

A rule is a function from a source text to what violates it, as a list of texts. At the end a table
of broken sources shows that each rule sees what it forbids.
"""
import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("rpo.py", "eval.py", "prepare_data.py")
TOP = {
    "rpo.py", "prepare_data.py", "eval.py", "tests", "requirements.txt", "README.md", "LICENSE",
    "docs", ".gitignore", ".ci",
}
BRANCHES = (
    ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.Assert)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

def read(name):
    return (ROOT / name).read_text(encoding="utf-8")

# ------------------------------------------------------------------------------------------------
# figures

def count_nodes(source):
    return sum(1 for _ in ast.walk(ast.parse(source)))

def density(source):
    """AST nodes a statement."""
    nodes = list(ast.walk(ast.parse(source)))
    return len(nodes) / sum(isinstance(node, ast.stmt) for node in nodes)

def functions(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]

def height(function):
    return function.end_lineno - function.lineno + 1

def complexity(function):
    """Cyclomatic: one, and one more for each place where the way forks."""
    count = 1
    for node in ast.walk(function):
        count += isinstance(node, BRANCHES)
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        if isinstance(node, ast.comprehension):
            count += len(node.ifs)
    return count

def wide_lines(source, columns):
    return [f"line {number}: {line}" for number, line in enumerate(source.splitlines(), 1)
            if len(line) > columns]

def figures(name):
    """All of it in two lines, to stand in a failure's message, too."""
    source = read(name)
    hardest = max(functions(source), key=complexity)
    longest = max(functions(source), key=height)
    return (
        f"{name}: {len(source.splitlines())} lines, {len(wide_lines(source, 100))} over 100 "
        f"columns; {count_nodes(source)} AST nodes, {density(source):.2f} a statement; "
        f"{len(walruses(source))} walruses\n"
        f"    hardest: {hardest.name}, complexity {complexity(hardest)}; "
        f"longest: {longest.name}, {height(longest)} lines")

# ------------------------------------------------------------------------------------------------
# rules: source -> what violates them

def at(node):
    return f"line {node.lineno}: {ast.unparse(node)[:100]}"

def named_lambdas(source):
    """A function with a name is written with def: it has a docstring's place and a traceback."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            if isinstance(node.value, ast.Lambda):
                found.append(at(node))
    return found

def called_name(node):
    """The last part of the name that a call calls: "exit" of sys.exit()."""
    if not isinstance(node, ast.Call):
        return None
    return getattr(node.func, "attr", getattr(node.func, "id", None))

def expressions_for_effect(source):
    """What depends on a condition stands under an if: no `x or fail()`, no `f() if x else g()`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.BoolOp, ast.IfExp)):
            found.append(at(node))
        # a call that does not return is an effect wherever its expression stands
        if isinstance(node, ast.BoolOp):
            operands = node.values
        elif isinstance(node, ast.IfExp):
            operands = [node.body, node.orelse]
        else:
            continue
        if any(called_name(operand) in ("fail", "exit", "die", "quit") for operand in operands):
            found.append(at(node))
    return found

def walruses(source):
    return [at(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.NamedExpr)]

def run_at_import(tree):
    """All nodes that an import evaluates: no bodies of functions, nothing under __main__."""
    queue = []
    for statement in tree.body:
        guard = isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
        if not guard:
            queue.append(statement)
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, FUNCTIONS):
            # of a function only its decorators and defaults are evaluated
            defaults = [value for value in node.args.kw_defaults if value]
            queue += node.decorator_list + node.args.defaults + defaults
        elif not isinstance(node, ast.Lambda):
            queue += ast.iter_child_nodes(node)

def imported_names(tree):
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                names.add(alias.asname or alias.name.split(".")[0])
    return names

def root_name(node):
    """`transformers` of transformers.masks["sdpa"].rule"""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", None)

def import_effects(source):
    """
    An import defines things and does nothing. It patches no library, for whoever imports us would
    run on the patch, and it freezes nothing of the environment, for a test could not change it.
    """
    tree = ast.parse(source)
    imported, found = imported_names(tree), []
    for node in run_at_import(tree):
        changed = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            changed = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            changed = [node.target]
        if any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in changed):
            found.append(at(node))
        # an imported name that is bound anew, or widened by |=
        if any(getattr(target, "id", None) in imported for target in changed):
            found.append(at(node))
        # a call whose result nobody takes is called for its effect
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            found.append(at(node))
        update = called_name(node) in ("update", "setdefault", "setattr", "register")
        if update and root_name(node) in {*imported, "setattr"}:
            found.append(at(node))
        if getattr(node, "attr", getattr(node, "id", None)) in ("environ", "getenv", "argv"):
            found.append(at(node))
    return found

def imports_of(source, modules):
    """Imports of these modules, wherever they stand."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or alias.name for alias in node.names]
        if {name.split(".")[0] for name in names} & modules:
            found.append(at(node))
    return found

def too_long(source, limit, main_limit):
    """Functions of more lines than a screen has; main may be longer."""
    return [f"{function.name}: {height(function)} lines" for function in functions(source)
            if height(function) > (main_limit if function.name == "main" else limit)]

def too_tangled(source, limit, main_limit):
    return [f"{function.name}: complexity {complexity(function)}" for function in functions(source)
            if complexity(function) > (main_limit if function.name == "main" else limit)]

def not_at_the_top(paths):
    """Folders and files beside those that a reader is told of."""
    return sorted({Path(path).parts[0] for path in paths} - TOP)

# ------------------------------------------------------------------------------------------------
# rpo.py

RPO = read("rpo.py")

@pytest.mark.parametrize("name", PROGRAMS)
def test_figures(name):
    """Nothing but a place where they are printed: the tests below judge them."""
    print(f"\n{figures(name)}")

def test_rpo_has_under_500_lines():
    """The promise of the first line: one file that can be read in one sitting."""
    assert len(RPO.splitlines()) < 500, figures("rpo.py")

def test_rpo_is_100_columns_wide():
    """And can be put on a screen; twenty lines may reach 110."""
    assert not wide_lines(RPO, 110), figures("rpo.py")
    assert len(wide_lines(RPO, 100)) <= 20, "\n".join(wide_lines(RPO, 100))

def test_rpo_is_not_dense():
    """Its lines are as light as those of the code that is read for its clarity."""
    assert count_nodes(RPO) <= 5200, figures("rpo.py")
    assert density(RPO) <= 14, figures("rpo.py")

def test_functions_of_rpo_are_short():
    assert not too_long(RPO, 50, 110), figures("rpo.py")

def test_functions_of_rpo_are_simple():
    assert not too_tangled(RPO, 12, 32), figures("rpo.py")

def test_rpo_has_at_most_two_walruses():
    """An assignment inside an expression is read twice."""
    assert len(walruses(RPO)) <= 2, walruses(RPO)

def test_rpo_imports_none_of_our_files():
    """It can be copied alone into another project."""
    ours = {path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"))} | {"tests"}
    assert not imports_of(RPO, ours)

# ------------------------------------------------------------------------------------------------
# all three programs

@pytest.mark.parametrize("name", PROGRAMS)
def test_no_lambda_is_bound_to_a_name(name):
    assert not named_lambdas(read(name))

@pytest.mark.parametrize("name", PROGRAMS)
def test_no_expression_is_written_for_its_effect(name):
    assert not expressions_for_effect(read(name))

@pytest.mark.parametrize("name", PROGRAMS)
def test_an_import_changes_nothing_and_reads_nothing(name):
    assert not import_effects(read(name))

@pytest.mark.parametrize("name", ["eval.py", "prepare_data.py"])
def test_tools_are_100_columns_wide(name):
    assert not wide_lines(read(name), 100)

@pytest.mark.parametrize("name", ["eval.py", "prepare_data.py"])
def test_tools_are_not_dense(name):
    assert density(read(name)) <= 14, figures(name)

@pytest.mark.parametrize("name", ["eval.py", "prepare_data.py"])
def test_functions_of_tools_are_simple(name):
    assert not too_tangled(read(name), 15, 15), figures(name)

def test_nothing_else_lies_at_the_top():
    """A newcomer sees ten names, and the README speaks of all of them."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: other files may lie here")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    paths = listed.stdout.splitlines()
    assert "rpo.py" in paths
    assert not not_at_the_top(paths)

# ------------------------------------------------------------------------------------------------
# the rules see what they forbid

def nested(depth):
    """A function of complexity depth + 1."""
    return "\n".join("    " * i + f"if x > {i}:" for i in range(1, depth + 1)) + " pass"

# a rule, and a line that breaks it when it is added to rpo.py
BROKEN = [
    (named_lambdas, "square = lambda x: x * x"),
    (named_lambdas, "square: object = lambda x: x * x"),
    (named_lambdas, "def f():\n    say = lambda text: print(text)"),
    (expressions_for_effect, "def f(x):\n    x or fail('no x')"),
    (expressions_for_effect, "def f(x):\n    x and x.close()"),
    (expressions_for_effect, "def f(x):\n    return x + (x.name or fail('no name'))"),
    (expressions_for_effect, "def f(x):\n    y = x or sys.exit('no x')"),
    (expressions_for_effect, "def f(x):\n    x.open() if x else None"),
    (expressions_for_effect, "def f(x):\n    return x if x else fail('no x')"),
    (walruses, "def f(x):\n    return (y := x) + y"),
    (walruses, "def f(x):\n    while y := x.pop():\n        print(y)"),
    (import_effects, "RANK = int(os.environ['RANK'])"),
    (import_effects, "RANK = os.environ.get('RANK')"),
    (import_effects, "RANK = os.getenv('RANK')"),
    (import_effects, "from os import environ\nRANK = environ['RANK']"),
    (import_effects, "OPTIONS = sys.argv[1:]"),
    (import_effects, "def f(rank=os.environ['RANK']):\n    pass"),
    (import_effects, "class Run:\n    rank = os.environ['RANK']"),
    (import_effects, "os.environ['TOKENIZERS_PARALLELISM'] = 'false'"),
    (import_effects, "from transformers.masking_utils import MASKS\nMASKS.update(sdpa=None)"),
    (import_effects, "from transformers.masking_utils import MASKS\nMASKS |= {'sdpa': None}"),
    (import_effects, "from transformers.masking_utils import MASKS\nMASKS['sdpa'] = None"),
    (import_effects, "F.cross_entropy = print"),
    (import_effects, "OLD = setattr(F, 'cross_entropy', print)"),
    (import_effects, "if True:\n    F.cross_entropy = print"),
    (import_effects, "torch.set_num_threads(1)"),
    (import_effects, "for name in ('a', 'b'):\n    torch.manual_seed(0)"),
]

@pytest.mark.parametrize("rule, line", BROKEN)
def test_a_rule_sees_what_it_forbids(rule, line):
    """In the midst of the whole program, of which it says nothing by itself."""
    assert len(rule(f"{RPO}\n{line}\n")) > len(rule(RPO))

@pytest.mark.parametrize("rule, line", [
    (named_lambdas, "def f(x):\n    return sorted(x, key=lambda y: y.size)"),
    (expressions_for_effect, "def f(x):\n    return x.name or x.title()"),
    (expressions_for_effect, "def f(x):\n    y = x.open() if x else None"),
    (import_effects, "def f():\n    return os.environ['RANK']"),
    (import_effects, "def f():\n    os.environ['A'] = 'b'"),
    (import_effects, "LIMIT = math.sqrt(2)"),
    (import_effects, "NAMES = {'a': 1} | {'b': 2}"),
    (import_effects, "if __name__ == '__main__':\n    os.environ['A'] = 'b'\n    f()"),
])
def test_a_rule_allows_what_is_no_violation(rule, line):
    assert len(rule(f"{RPO}\n{line}\n")) == len(rule(RPO))

@pytest.mark.parametrize("line", [
    "import prepare_data",
    "import eval as evaluation",
    "from prepare_data import gold_reward",
    "def f():\n    from tests.conftest import run",
])
def test_an_import_of_our_files_is_seen(line):
    assert imports_of(f"{RPO}\n{line}\n", {"prepare_data", "eval", "tests"})

def test_wide_lines_are_seen():
    assert wide_lines("x" * 101, 100) and not wide_lines("x" * 100, 100)

def test_density_by_hand():
    """A module of two assignments: each has a target and a value, each of these a context."""
    light = "a = b\nc = d\n"
    assert count_nodes(light) == 1 + 2 * 5
    assert density(light) == 11 / 2

def test_density_is_seen():
    dense = "a = {**b, **{key: f(value) for key, value in c.items() if value}} | dict(zip(d, e))\n"
    assert density(dense) > 25

@pytest.mark.parametrize("body, expected", [
    ("pass", 1),
    ("return 1 if x else 2", 2),
    ("return x and y and z", 3),
    ("return [a for a in x if a if a > 1]", 4),
    ("try:\n        pass\n    except OSError:\n        pass", 2),
    ("for a in x:\n        assert a", 3),
])
def test_complexity_by_hand(body, expected):
    (function,) = functions(f"def f(x, y, z):\n    {body}")
    assert complexity(function) == expected

def test_tangled_functions_are_seen():
    """One fork more than the limit; main has a limit of its own."""
    source = f"def f(x):\n{nested(12)}\ndef main(x):\n{nested(31)}\n"
    assert too_tangled(source, 12, 32) == ["f: complexity 13"]
    assert too_tangled(source, 13, 31) == ["main: complexity 32"]

def test_long_functions_are_seen():
    source = "def f(x):\n" + "    x += 1\n" * 50 + "def main(x):\n" + "    x += 1\n" * 109
    assert too_long(source, 50, 110) == ["f: 51 lines"]
    assert too_long(source, 51, 109) == ["main: 110 lines"]

def test_other_names_at_the_top_are_seen():
    assert not_at_the_top(["rpo.py", "docs/a.md", "setup.py", "assets/b.png"]) == [
        "assets", "setup.py"]
