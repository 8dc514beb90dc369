"""What SECURITY.md promises: loaders that run no code, sockets on the loopback, no request to anywhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "tuning").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
UNSAFE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"}
UNSAFE |= {f"{name}.{call}" for name in ("pickle", "cloudpickle", "dill", "marshal") for call in ("load", "loads")}
UNSAFE |= {f"{name}.{call}" for name in ("pd", "pandas") for call in ("read_pickle", "eval")} | {"pickle.Unpickler"}
UNSAFE |= {f"yaml.{call}" for call in ("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all")}
UNSAFE |= {"joblib.load", "shelve.open", "safetensors.torch.load_model"}
WEIGHTS_ONLY = {"torch.load", "load_state_dict"}  # the second is timm's, a plain name
LISTENING = {"socket.create_server", "HTTPServer", "ThreadingHTTPServer", "http.server.HTTPServer", "http.server"}


def calls(path):
    """Every call of a file: its name as written, and the node."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def wrong(path):
    for name, node in calls(path):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = name in UNSAFE or (name in WEIGHTS_ONLY and given.get("weights_only") != "True")
        shell = given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False"
        loader = name.endswith("Loader") and "Safe" not in name and name.startswith("yaml")
        if unsafe or shell or loader:
            yield f"{path.name}:{node.lineno}: {name}"


def test_only_loaders_that_run_no_code_are_called():
    # The example's page is run block by block: code of this project, as its tests are.
    assert [found for path in SOURCES if path.name != "example.py" for found in wrong(path)] == []


@pytest.mark.parametrize(
    "code",
    [
        "pickle.load(file)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "pd.read_pickle(path)",
    ],
)
def test_unsafe_calls_are_found(tmp_path, code):
    (tmp_path / "code.py").write_text(code)
    assert list(wrong(tmp_path / "code.py"))


def test_pickle_is_imported_for_its_errors_alone():
    for path in SOURCES:
        used = set(re.findall(r"\bc?(?:loud)?pickle\.(\w+)", path.read_text()))
        assert used <= {"UnpicklingError"}, path


def test_servers_are_bound_to_the_loopback():
    for path in SOURCES:
        for name, node in calls(path):
            if name in LISTENING or name.endswith(".bind"):
                assert "127.0.0.1" in ast.unparse(node), f"{path.name}:{node.lineno}"
        assert "0.0.0.0" not in path.read_text(), path
