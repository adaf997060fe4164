"""The page's server without a browser: names of its actions, what a stranger must not get, and the command."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from demo_server import serving

from diffaccel.cli.demo import AUTH_VARIABLE, credentials
from diffaccel.files import metadata

USER, PASSWORD = "somebody", "correct horse 7h"
NAMES = (
    "/compare /explore /erase /batch /cancel_compare /cancel_explore /cancel_erase /cancel_batch /apply_edit /undo_edit "
    "/upload_recipe /check_batch"
).split()
# model, prompt, negative prompt, seed, steps, guidance, width, height
PICTURE = ["shapes-sd", "a red square", "", 4, 2, None, None, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(folder, tiny_folder) -> Iterator[str]:
    with serving(folder, "--allow", str(tiny_folder.parent), **{AUTH_VARIABLE: f"{USER}:{PASSWORD}"}) as url:
        yield url


@pytest.fixture
def client(address, tmp_path) -> Iterator[Any]:
    from gradio_client import Client

    made = Client(address, auth=(USER, PASSWORD), verbose=False, download_files=str(tmp_path), analytics_enabled=False)
    yield made
    made.close()


def text(html: Any) -> str:
    value = html.get("value", "") if isinstance(html, dict) else html
    return re.sub(r"<[^>]*>", " ", str(value))


def path_of(update: Any) -> Path:
    value = update["value"] if isinstance(update, dict) and "value" in update else update
    return Path(value["path"] if isinstance(value, dict) else value)


def test_every_action_has_a_name(client):
    known = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(NAMES) <= set(known)
    assert not [name for name in known if "lambda" in name or "check_recipe" in name]


def test_erasing_begins_with_the_choice_of_python(client):
    known = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/erase"]["parameters"]
    (method,) = [entry for entry in known if entry["label"] == "Method"]
    assert method["parameter_default"] == "automatic"


def test_compare_by_name(client):
    result = client.predict(*PICTURE, "fewer-steps", False, api_name="/compare")
    plain, fast = (metadata.read(path_of(item)) for item in result[4:6])
    assert plain.parameters["Prompt"] == fast.parameters["Prompt"] == "a red square"
    assert fast.diffaccel["recipe"]["methods"] == [
        {"method": "step_schedule", "fraction": 0.5, "steps": None, "spacing": None}
    ]
    assert "PSNR to plain" in text(result[1])
    assert "Done" in text(result[-1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["/etc", *PICTURE[1:], "off", False], "no model this page may load"),
        ([*PICTURE[:4], 10_000, *PICTURE[5:], "off", False], "Steps|less than|Value"),
        ([*PICTURE, '{"schema": 1, "methods": [{"method": "erase", "file": "/etc/passwd"}]}', False], "no switches"),
        ([*PICTURE[:-2], 100_000, 100_000, "off", False], "Width"),
        ([*PICTURE[:3], 1.7, *PICTURE[4:], "off", False], "Seed: input should be a valid integer"),
        ([*PICTURE, '{"schema": 1, "methods": [{"method": "<b>"}]}', False], "Unknown method '&lt;b&gt;'"),
    ],
)
def test_wrong_calls_are_sentences(client, arguments, sentence):
    with pytest.raises(Exception, match=sentence):
        client.predict(*arguments, api_name="/compare")


def test_no_number_of_the_page_is_rounded(client):
    """1.7 as a seed became 2 before anybody could refuse it."""
    numbers = [part["props"] for part in client.config["components"] if part["type"] in ("number", "slider")]
    assert len(numbers) > 5
    assert [number["label"] for number in numbers if number.get("precision") is not None] == []


def test_cancel_by_name(client):
    job = client.submit(*PICTURE[:4], 100, None, None, None, "off", True, api_name="/compare")
    answers: list[str] = []

    def insist() -> None:
        while not job.done() and not any("stops" in answer for answer in answers):
            answers.append(text(client.predict(api_name="/cancel_compare")))

    thread = threading.Thread(target=insist)
    thread.start()
    assert "Cancelled" in text(job.result(timeout=60)[-1])
    thread.join(30)
    assert "Nothing is running" in text(client.predict(api_name="/cancel_compare"))


def test_a_list_with_mistakes_is_told_row_by_row(client, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "rows.csv").write_text("prompt,steps\na,2\n,3\nb,zero\n")
    found = text(
        client.predict(handle_file(tmp_path / "rows.csv"), 0, 2, None, None, None, "png", True, api_name="/check_batch")
    )
    assert "2 problems" in found
    assert "row 2" in found
    assert "row 3" in found


def test_a_batch_by_name(client, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "rows.txt").write_text("a red square\na blue circle\n")
    file = handle_file(tmp_path / "rows.txt")
    arguments = ["shapes-sd", "", 1, 2, None, None, None, "off", file, "png", True]
    result = client.predict(*arguments, api_name="/batch")
    assert "Done: 2 of 2 pictures" in text(result[-1])
    assert path_of(result[2]).suffix == ".zip"


def status(address: str, path: str, cookie: str | None = None) -> int:
    """What the server answers to a plain request."""
    request = urllib.request.Request(address.rstrip("/") + path, headers={"Cookie": cookie} if cookie else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code


def test_browsers_are_told_to_load_nothing_from_elsewhere(address):
    """Whatever text came to stand in the page: not even a picture of another machine is fetched."""
    with urllib.request.urlopen(address, timeout=20) as answer:
        policy = answer.headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'self'"
    assert not [rule for rule in rules.values() if "http" in rule or "*" in rule]


def test_strangers_get_nothing(address):
    for path in ("/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd"):
        assert status(address, path) in (401, 403)


def test_visitors_get_no_files_of_the_machine(address, client, folder, tiny_folder):
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    assert status(address, "/config", cookie) == 200
    names = [Path(__file__).resolve(), "/etc/passwd", folder / "server.log", tiny_folder / "model_index.json"]
    for name in [*map(str, names), f"{folder}/../../../../../../etc/passwd"]:
        assert status(address, f"/gradio_api/file={name}", cookie) in (403, 404), name


def test_actions_read_no_files_of_the_machine(address, client, tmp_path):
    """A client may write any path where a file belongs; only what it uploaded itself is read."""
    (tmp_path / "mine.txt").write_text("a secret of this machine")
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    file = {"path": str(tmp_path / "mine.txt"), "meta": {"_type": "gradio.FileData"}}
    said = called(address, cookie, "check_batch", [file, 0, 2, None, None, None, "png", True, "shapes-sd"])
    assert "event: error" in said
    assert "secret" not in said


@pytest.mark.parametrize("place", ["https://example.com/rows.txt", "http://127.0.0.1:9/rows.txt"])
@pytest.mark.parametrize("action", ["check_batch", "upload_recipe", "compare"])
def test_the_server_fetches_no_addresses(address, client, place, action):
    """Gradio fetches what a client names by its address, wherever in the input it stands."""
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    file = {"path": place, "meta": {"_type": "gradio.FileData"}}
    data = {
        "check_batch": [file, 0, 2, None, None, None, "png", True, "shapes-sd"],
        "upload_recipe": [file, "shapes-sd"],
        "compare": ["shapes-sd", file, *PICTURE[2:], "off", False],
    }
    assert "this server fetches no addresses" in called(address, cookie, action, data[action])


def called(address: str, cookie: str, action: str, data: list[Any]) -> str:
    """What the server answers to a call by hand."""
    headers = {"Cookie": cookie, "Content-Type": "application/json"}
    body = json.dumps({"data": data}).encode()
    call = urllib.request.Request(f"{address}gradio_api/call/{action}", data=body, headers=headers)
    with urllib.request.urlopen(call, timeout=20) as answer:
        event = json.loads(answer.read())["event_id"]
    result = urllib.request.Request(f"{address}gradio_api/call/{action}/{event}", headers=headers)
    with urllib.request.urlopen(result, timeout=20) as answer:
        return str(answer.read().decode())


def test_uploads_have_a_limit(client, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "rows.txt").write_bytes(b"a\n" * 5_000_000)
    with pytest.raises(Exception, match=r"413|exceeded|large|size"):
        client.predict(handle_file(tmp_path / "rows.txt"), 0, 2, None, None, None, "png", True, api_name="/check_batch")


def test_the_password_is_nowhere_and_nothing_is_sent_home(address, folder, client):
    config = json.dumps(client.config)
    assert '"analytics_enabled": false' in config
    for shown in (config, (folder / "server.log").read_text()):
        assert PASSWORD not in shown


# --- the command ---


def test_credentials_come_from_text_or_file(tmp_path):
    (tmp_path / "login").write_text("user:pass:word\nmore\n")
    assert credentials(f"@{tmp_path / 'login'}") == ("user", "pass:word")
    assert credentials("user:secret") == ("user", "secret")


@pytest.mark.parametrize("given", ["topsecret", ":topsecret", "topsecret:", "@/no/topsecret"])
def test_wrong_credentials_are_not_repeated(given):
    with pytest.raises(typer.BadParameter) as refused:
        credentials(given)
    assert "topsecret" not in str(refused.value)


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    import sys

    from typer.testing import CliRunner

    from diffaccel.cli.app import app

    for name in [name for name in sys.modules if name.startswith("diffaccel.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "pip install 'diffaccel[demo,metrics]'" in " ".join(result.output.split())
