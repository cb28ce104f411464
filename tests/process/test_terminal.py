"""The command line on a real terminal: what a person sees, types and is left with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import termios
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from server import PATIENCE, SERENO, Server, environment, until

CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Terminal:
    """A command on a pseudo-terminal, and the screen that its output makes."""

    def __init__(self, server: Server, *args: str, width: int = 80, **env: str) -> None:
        self._ours, theirs = os.openpty()
        self.resize(width)
        variables = environment(**{"TERM": "xterm-256color", "SERENO_URL": server.url, **env})
        for name in {"COLUMNS", "LINES", "NO_COLOR"} - set(env):
            variables.pop(name, None)
        self._process = subprocess.Popen(
            [str(SERENO), *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=variables,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            start_new_session=True,
        )
        self.modes_before = termios.tcgetattr(theirs)[3]
        self._theirs = theirs
        self.raw = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        text = b""
        with contextlib.suppress(OSError):  # closed
            while chunk := os.read(self._ours, 65536):
                text += chunk
                self.raw = text.decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._close()
        os.close(self._ours)

    def _close(self) -> None:
        """Without a writer left, the reader comes to the end of what was written."""
        if self._theirs >= 0:
            os.close(self._theirs)
            self._theirs = -1
        self._reader.join(PATIENCE)

    def resize(self, width: int, height: int = 24) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def is_stopped(self) -> None:
        stat = Path(f"/proc/{self._process.pid}/stat")
        until(lambda: stat.read_text().rpartition(") ")[2][0] == "T", "it is stopped")

    @property
    def typed(self) -> int:
        """How many bytes wait to be read."""
        return struct.unpack("i", fcntl.ioctl(self._theirs, termios.FIONREAD, bytes(4)))[0]

    @property
    def modes(self) -> int:
        modes: int = termios.tcgetattr(self._theirs)[3]
        return modes

    @property
    def screen(self) -> list[str]:
        """Lines as they stand, those that were scrolled out of sight too."""
        return drawn(self.raw)

    def shows(self, pattern: str) -> None:
        """Wait until a line of the screen matches."""
        looked_at = None

        def shown() -> bool:
            nonlocal looked_at
            if (raw := self.raw) == looked_at:
                return False
            looked_at = raw
            return any(re.search(pattern, line) for line in drawn(raw))

        until(shown, f"{pattern!r} is on the screen")

    def end(self) -> int:
        """Wait for the command to end; its exit code."""
        code = self._process.wait(PATIENCE)
        self._close()
        return code


def drawn(raw: str) -> list[str]:
    """What a terminal shows of this: the few controls that move or erase, others have no effect."""
    lines, row, column = [""], 0, 0
    at = 0
    while at < len(raw):
        control = CONTROL.match(raw, at)
        if control is not None:
            at = control.end()
            match control.groups():
                case (number, "A"):
                    row = max(0, row - int(number or 1))
                case ("2", "K"):
                    lines[row] = ""
                case ("", "H"):
                    row = column = 0
                case ("2", "J"):
                    lines = [""] * len(lines)
            continue
        char, at = raw[at], at + 1
        if char == "\r":
            column = 0
        elif char == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif char >= " ":
            line = lines[row].ljust(column)
            lines[row] = line[:column] + char + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def run(server: Server, graph: str, thread: str, *args: str, **more: Any) -> Terminal:
    given = ("run", graph, "--thread", thread, "--input", '{"seen": []}', *args)
    return Terminal(server, *given, **more)


def test_a_run_is_a_tree_that_goes_on_and_then_stays(server: Server) -> None:
    server.hold("t", "two")
    with run(server, "nested", "t") as terminal:
        terminal.shows(r"^  [⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] two  ")
        assert any(line.startswith("  ✓ one  ") for line in terminal.screen)
        server.release("t", "two")

        assert terminal.end() == 0

    shown = [re.sub(r"  [\d.]+ m?s$", "", line) for line in terminal.screen]
    tree = shown[shown.index("✓ before") :]
    assert tree[:7] == [
        "✓ before",
        "✓ sub",
        "  ✓ one",
        "    │ from one",
        "  ✓ two",
        "    │ words of an inner node",
        "✓ after",
    ]
    assert tree[7].startswith("✓ success after ")
    assert any(re.fullmatch(r"  trace [0-9a-f]{32}", line) for line in tree)
    assert f"  sereno trace {server.run_on('t')} --url {server.url}" in "".join(tree)
    assert terminal.raw.rstrip().count("\x1b[?25h") == 1  # the cursor is back


def test_a_retry_counts_down_and_ctrl_c_leaves_the_run(server: Server) -> None:
    server.hold("t", "tire")
    with run(server, "tiring", "t") as terminal:
        terminal.shows(r"^↻ tire  attempt 2 of 3 in 1[12]\d\.\d s  connection \(Conn")
        terminal.type("\x03")

        assert terminal.end() == 130

    run_id = server.run_on("t")
    text = "".join(terminal.screen)
    assert "… tire  not over" in terminal.screen
    assert f"run {run_id} goes on without you; watch it: `sereno tail {run_id} --after" in text
    assert f"end it: `sereno cancel {run_id} " in text
    assert server.get(f"/v1/runs/{run_id}").json()["status"] == "running"


def test_an_interrupt_comes_with_the_command_that_answers(server: Server) -> None:
    with run(server, "asking", "t", width=40) as terminal:
        assert terminal.end() == 3

    assert "? ask  waits for an answer" in terminal.screen
    assert "  │ question: 1" in terminal.screen
    (told,) = [line for line in terminal.screen if "waits for an answer; give it" in line]
    assert (
        f"`sereno answer {server.run_on('t')} '…' --url {server.url}`" in told
    )  # in one piece, to be copied
    with Terminal(server, "answer", "t", '{"ok": true}') as terminal:
        terminal.end()

    assert f"▶ run {server.run_on('t')} · thread t" in terminal.screen
    assert any(line.startswith(("✓ ask", "? ask")) for line in terminal.screen)


def test_a_server_that_dies_and_comes_back_is_told_of_and_nothing_is_shown_twice(
    server: Server,
) -> None:
    server.hold("t", "b")
    with run(server, "chain", "t") as terminal:
        terminal.shows(r"^✓ a  ")
        terminal.shows(r"^\S b  ")
        port = server.url.rpartition(":")[2]
        server.kill()
        terminal.shows(r"^! the connection .* after line \d+; reconnecting in ")
        server.start("--port", port)
        terminal.shows(r"^! recovered after a crash, epoch 2")
        server.release("t", "b")

        assert terminal.end() == 0

    names = [line[:3] for line in terminal.screen if line[:2] == "✓ "]
    assert names == ["✓ a", "✓ b", "✓ c", "✓ s"]
    assert "".join(terminal.screen).count("first words of the chain") == 1


def test_ctrl_z_leaves_the_terminal_to_the_shell_until_it_is_given_back(server: Server) -> None:
    server.hold("t", "a")
    with run(server, "chain", "t") as terminal:
        terminal.shows("│ first words of the chain")
        terminal.type("\x1a")
        terminal.is_stopped()
        assert terminal.modes == terminal.modes_before
        # It is stopped before we have read all that it wrote.
        until(
            lambda: terminal.raw.rfind("\x1b[?25h") > terminal.raw.rfind("\x1b[?25l"),
            "the cursor is back",
        )
        assert not any("first words" in line for line in terminal.screen)
        server.release("t", "a")
        terminal.signal(signal.SIGCONT)

        assert terminal.end() == 0

    assert "".join(terminal.screen).count("first words of the chain") == 1


def test_what_is_typed_does_not_break_the_tree(server: Server) -> None:
    server.hold("t", "a")
    with run(server, "chain", "t") as terminal:
        terminal.shows("│ first words of the chain")
        terminal.type("typed\r\r")
        until(lambda: terminal.typed >= len("typed\r"), "the kernel has it")
        server.release("t", "a")

        assert terminal.end() == 0

    assert "typed" not in terminal.raw


@pytest.mark.parametrize("command", ["run", "top"])
def test_a_command_that_is_told_to_end_leaves_the_terminal_as_it_was(
    server: Server, command: str
) -> None:
    server.hold("t", "a")
    args = ("chain", "--thread", "t", "--input", "{}") if command == "run" else ()
    with Terminal(server, command, *args) as terminal:
        terminal.shows(r"^\S a  |^no run goes on")
        until(lambda: not terminal.modes & termios.ECHO, "it has the keyboard")
        terminal.signal(signal.SIGTERM)
        until(lambda: terminal.modes == terminal.modes_before, "the terminal is as it was")

        assert terminal.end() == 143

    assert terminal.raw.count("\x1b[?25l") == terminal.raw.count("\x1b[?25h")


def test_what_is_drawn_after_a_resize_fits(server: Server) -> None:
    server.hold("t", "a")
    with run(server, "chain", "t", width=100) as terminal:
        terminal.shows("│ first words of the chain")
        before = len(terminal.raw)
        terminal.resize(20)
        terminal.shows(r"^  │ the chain$")
        server.release("t", "a")

        assert terminal.end() == 0

    after = drawn(terminal.raw[before:])
    summary = next(i for i, line in enumerate(after) if line.startswith("✓ success"))
    assert all(len(line) <= 20 for line in after[: summary + 1])


@pytest.mark.parametrize("columns", ["200", "30"])
def test_columns_of_the_environment_are_not_believed_beyond_what_there_is(
    server: Server, columns: str
) -> None:
    with run(server, "chain", "t", width=40, COLUMNS=columns) as terminal:
        assert terminal.end() == 0

    summary = next(i for i, line in enumerate(terminal.screen) if line.startswith("✓ success"))
    widths = [len(line) for line in terminal.screen[: summary + 1]]
    assert max(widths) <= min(40, int(columns))


def test_a_terminal_without_our_letters_gets_others(server: Server) -> None:
    with run(server, "chain", "t", PYTHONIOENCODING="ascii") as terminal:
        assert terminal.end() == 0

    assert terminal.raw.isascii()
    assert any(line.startswith("+ success after ") for line in terminal.screen)
    assert "  | first words of the chain" in terminal.screen


@pytest.mark.parametrize(
    ("env", "sent"),
    [
        pytest.param({"NO_COLOR": "1"}, r"\x1b\[[0-9;]*3[0-7]m", id="no-color"),
        pytest.param({"TERM": "dumb"}, r"\x1b", id="dumb"),
    ],
)
def test_a_terminal_that_can_less_is_sent_less(
    server: Server, env: dict[str, str], sent: str
) -> None:
    with run(server, "chain", "t", **env) as terminal:
        assert terminal.end() == 0

    assert not re.search(sent, terminal.raw)
    assert any(line.startswith("✓ success") for line in terminal.screen)


def test_a_pipe_gets_lines_and_nothing_else(server: Server) -> None:
    done = subprocess.run(
        [str(SERENO), "run", "chain", "--input", '{"seen": []}', "--url", server.url],
        env=environment(),
        capture_output=True,
        check=True,
    )

    assert done.stderr == b""
    assert all(json.loads(line)["v"] == 1 for line in done.stdout.splitlines())


def test_a_pipe_that_nobody_reads_ends_it_quietly_and_not_the_run(server: Server) -> None:
    server.hold("t", "a")
    given = [str(SERENO), "run", "chain", "--thread", "t", "--input", "{}", "--url", server.url]
    with subprocess.Popen(
        given, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["type"] == "run.queued"
        process.stdout.close()
        server.release("t", "a")

        assert process.wait(PATIENCE) == 141
        assert process.stderr.read() == b""

    run_id = server.run_on("t")
    assert run_id is not None
    server.wait_line(run_id, "run.completed")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("ps", 0),
        ("graphs", 0),
        ("top", 0),
        ("run asking --thread new --input {}", 3),
        ("tail RUN", 3),
        ("trace RUN", 0),
        ("run chain --input - <&-", 2),
        ("run nope --input {} 2>&-", 4),
    ],
)
def test_streams_that_are_closed_are_like_empty_ones(
    server: Server, command: str, code: int
) -> None:
    run_id = server.submit("asking", "t")
    server.wait_line(run_id, "run.interrupted")
    shell = f'exec "$0" {command.replace("RUN", run_id)} >&-'

    done = subprocess.run(
        ["sh", "-c", shell, str(SERENO)],
        env=environment(SERENO_URL=server.url),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )

    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert all(line.startswith("sereno: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize("key", [pytest.param("q", id="q"), pytest.param("\x03", id="ctrl-c")])
def test_top_shows_what_goes_on_until_a_key_ends_it(server: Server, key: str) -> None:
    server.hold("one", "tire")
    server.hold("two", "two")
    server.submit("tiring", "one")
    run_id = server.submit("nested", "two")
    server.entered("two", "two")
    with Terminal(server, "top", "--admin-url", server.admin) as terminal:
        terminal.shows(r"^2 running of \d+ slots · 0 queued · 3 nodes open · 1 waiting to retry")
        terminal.shows(rf"^▶ {run_id} nested  .* s.*thread two$")
        terminal.shows(r"^  . sub/two  ")
        terminal.shows(r"^  ↻ tire  attempt 2 of 3 in 1[12]\d\.\d s")
        assert not terminal.modes & termios.ECHO
        server.release("two", "two")
        terminal.shows("^1 running of ")
        terminal.type(key)
        until(lambda: terminal.modes & termios.ECHO, "the terminal is as it was")

        assert terminal.end() == 0

    assert terminal.raw.count("\x1b[?1049h") == terminal.raw.count("\x1b[?1049l") == 1


def test_top_outlives_its_server(server: Server) -> None:
    with Terminal(server, "top") as terminal:
        terminal.shows("^no run goes on")
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        terminal.shows("^! no server at http")
        terminal.type("q")

        assert terminal.end() == 0
