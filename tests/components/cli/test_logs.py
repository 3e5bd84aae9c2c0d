"""With UNIVIGU_LOG_FORMAT=json, standard error is JSON lines, and everything that reads it still understands it."""

import io
import json
import os
import subprocess
import sys

from components.cli.logs import FORMAT, JsonLines
from components.pipeline.processes import plain_line, read_lines, sentence, start_child


def test_each_line_is_one_object_however_it_is_written():
    out = io.StringIO()
    stream = JsonLines(out)
    print("step 1/2", 'loss "0.5"', file=stream)
    stream.write("50%\r100%\n\n  \nno end")
    assert [json.loads(line)["message"] for line in out.getvalue().splitlines()] == [
        'step 1/2 loss "0.5"',
        "50%",
        "100%",
    ]
    stream.close()
    last = json.loads(out.getvalue().splitlines()[-1])
    assert (last["message"], last["level"], last["process"]) == ("no end", "info", os.getpid())
    assert not stream.isatty()


def test_an_object_of_a_child_is_not_wrapped_again_and_no_other_line_is_changed():
    out = io.StringIO()
    print("univigu: The disk is full.", file=JsonLines(out))
    print(out.getvalue(), end="", file=JsonLines(again := io.StringIO()))
    assert json.loads(again.getvalue())["message"] == "univigu: The disk is full."
    assert json.loads(again.getvalue())["level"] == "error"
    for line in ('{"message": "of someone else"}', "{", "[1]", '{"message":', "a line", "{" * 5000 + '"message"'):
        assert plain_line(f"{line}\n") == line


def test_a_parent_finds_the_message_of_a_child_that_logs_json():
    shown = []
    command = [sys.executable, "-m", "components.cli.main", "run", "no-such-step"]
    with start_child(command, {FORMAT: "json"}) as process:
        message = read_lines(process, shown.append)
    assert "no-such-step" in message
    assert shown == [f"univigu: {message}"]
    assert sentence("step 1/2") == ""


CRASH = "from components.cli import main\nmain.app = lambda: {}['gone']\nmain.main()"


def test_a_traceback_is_one_object_and_a_wrong_setting_one_sentence():
    def run(chosen):
        environment = {**os.environ, FORMAT: chosen}
        command = [sys.executable, "-c", CRASH]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run("json")
    (record,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert (record["level"], record["message"], done.returncode) == ("error", "KeyError: 'gone'", 1)
    assert record["traceback"].startswith("Traceback")
    done = run("xml")
    assert (done.stderr, done.returncode) == (f"univigu: {FORMAT} is 'xml'; set it to text or json.\n", 78)
