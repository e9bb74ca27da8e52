"""The process beside each training process of a run on several hosts: it sees a host end, and ends its own.

A script of its own that imports neither JAX nor anything of ours, because what it watches over may hang in a
collective, hold the interpreter's lock, or be aborted by the runtime before it can say a word. Owns the
connections among the watchers of a run and the sentence that a host leaves behind. Must not know what the
processes compute.

The watcher of process 0 listens; the others connect to it. All talk in lines of JSON. A connection that
breaks without a goodbye, a parent that ends without one, and SILENCE_S without a sign of life are an end
without a word. The news goes to everybody; each prints it, gives its parent a moment to end, and kills it.
Whoever does not know the secret of the run (a scan of the port, say) is let go and changes nothing.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import time

TICK_S = 1.0
SILENCE_S = 30  # counted in ticks of our own, so that a machine that was suspended as a whole loses nobody
CONNECT_S = 5.0
GRACE_S = 2.0  # how long a parent may take to end by itself
NEWS_WAIT_S = 10.0  # a communication error waits so long for the news of its cause
LINGER_S = 3.0  # the runtime may abort a parent before the news of the cause is here
STAY_S = 6.0  # process 0 ends last, if it can: the runtime aborts the others, with a dump, when it is gone
LONGEST = 1 << 20  # bytes of a line: what is longer comes from no watcher
# What a scheduler or a terminal sends to all processes of a job is a wish to the parent. Who sees the parent
# end has to outlive it, and ends by itself then.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Line:
    """One end of a connection: lines of JSON, and how long nothing has come."""

    def __init__(self, descriptor, write):
        self.descriptor, self._write = descriptor, write
        self.process = None  # who is at the other end, once it has said so
        self.silent = 0
        self._buffer = b""

    def fileno(self):
        return self.descriptor.fileno()

    def send(self, message):
        """Whether the other end could still be written to."""
        try:
            self._write(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self):
        """Whole messages that have come, None at the end of the connection or of what can be understood."""
        try:
            data = os.read(self.fileno(), 65536)
        except OSError:
            data = b""
        if not data:
            return None
        self.silent = 0
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines if line]
        except (ValueError, RecursionError):
            return None
        understood = all(isinstance(message, dict) for message in messages)
        return messages if understood and len(self._buffer) <= LONGEST else None


class Watcher:
    """The state of one watcher; `run` is its life."""

    def __init__(self, process, parent):
        self.process, self.parent_id = process, parent
        self.secret = secrets.token_hex(16)  # of process 0; the others are told
        self.parent = Line(sys.stdin, None)
        self.peers = []
        self.listener = None
        self.news = None  # the first end that another process came to
        self.deadline = None  # when the parent is killed
        self.reply_by = None  # when the parent's question for news is answered
        self.question = {}  # what the parent says of its own end
        self.own = None  # the same, once it has gone to everybody
        self.leave_by = None  # the parent may end when all others have, or after this
        self.gone_by = None  # the parent has ended, and nobody waits for news after this
        self.leaving = False  # the parent has said goodbye
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.parent, selectors.EVENT_READ, self.from_parent)

    def listen(self):
        """Opens the port of process 0; returns its number."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self.listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        return self.listener.getsockname()[1]

    def connect(self, addresses, secret):
        """Reaches process 0 by the first address that answers; returns what was wrong with all of them."""
        self.secret = secret
        problems = []
        for host, port in addresses:
            try:
                connection = socket.create_connection((host, port), timeout=CONNECT_S)
            except OSError as error:
                problems.append(f"{host}: {error}")
                continue
            connection.settimeout(None)
            self.add(connection).process = 0
            self.tell(self.peers, {"hello": self.process, "secret": self.secret})
            return None
        return "; ".join(problems)

    def add(self, connection):
        line = Line(connection, connection.sendall)
        self.peers.append(line)
        self.selector.register(line, selectors.EVENT_READ, self.from_peer)
        return line

    def accept(self, listener):
        try:
            connection = listener.accept()[0]
        except OSError:  # whoever it was has gone again
            return
        connection.setblocking(True)
        self.add(connection)

    def run(self):
        """Until the parent has ended."""
        tick = time.monotonic()
        while True:
            for key, _ in self.selector.select(TICK_S / 4):
                key.data(key.fileobj)
            now = time.monotonic()
            if now - tick >= TICK_S:
                tick = now
                self.each_tick()
            if self.reply_by is not None and (self.news is not None or now >= self.reply_by):
                self.answer()
            if self.leave_by is not None and (not self.peers or now >= self.leave_by):
                self.leave_by = self.deadline = None
                self.reply({"news": self.news})
            if self.deadline is not None and now >= self.deadline:
                self.kill_parent()
            if self.gone_by is not None and (self.news is not None or now >= self.gone_by):
                self.say_goodbye()
                return

    def each_tick(self):
        self.tell(self.peers, {"alive": self.process})
        for line in list(self.peers):
            line.silent += 1
            if line.silent > SILENCE_S:
                self.lost(line, f"gave no sign of life for {SILENCE_S} s")

    def tell(self, lines, message):
        for line in list(lines):
            if not line.send(message):
                self.lost(line, "ended without a word")

    def from_peer(self, line):
        messages = line.receive()
        if messages is None:
            self.lost(line, "ended without a word")
            return
        for message in messages:
            if "hello" in message and message.get("secret") == self.secret:
                line.process = message["hello"]
            elif line.process is None or "bye" in message:  # a stranger
                self.drop(line)
                return
            elif "process" in message:
                self.hear(message)

    def drop(self, line):
        if line in self.peers:
            self.peers.remove(line)
            self.selector.unregister(line)
            line.descriptor.close()

    def lost(self, line, how):
        known = line in self.peers and line.process is not None
        self.drop(line)
        if known and not self.leaving:
            self.hear({"process": line.process, "how": "lost", "text": how, "status": 1})

    def hear(self, news):
        """The first news is the cause; what comes later are its consequences."""
        if self.news is not None or self.own is not None or news["process"] == self.process:
            return
        self.news = news
        self.tell([line for line in self.peers if line.process != news["process"]], news)
        print(f"error: {sentence(news)}", file=sys.stderr, flush=True)
        self.deadline = time.monotonic() + GRACE_S

    def from_parent(self, _):
        messages = self.parent.receive()
        if messages is None:
            self.selector.unregister(self.parent)
            waits = self.process > 0 and not self.leaving and self.own is None
            self.gone_by = time.monotonic() + (LINGER_S if waits else 0.0)
        for message in messages or ():
            if "connect" in message:
                self.reply({"problem": self.connect(message["connect"], message["secret"])})
            elif "done" in message:
                self.leaving = True
                self.reply({})
            elif "failed" in message:
                self.question = message
                self.reply_by = time.monotonic() + (NEWS_WAIT_S if message["communication"] else 0.0)

    def answer(self):
        """The parent's own end goes to everybody, unless another's is its cause; then it may end."""
        self.reply_by = None
        if self.news is None:
            self.own = {
                "process": self.process,
                "how": "failed",
                "text": self.question["failed"],
                "status": self.question["status"],
            }
            self.tell(self.peers, self.own)
        self.leave_by = time.monotonic() + (STAY_S if self.process == 0 else 0.0)

    def say_goodbye(self):
        """For the parent, which has ended; also where it could not say why."""
        if self.leaving:
            self.tell(self.peers, {"bye": self.process})
        elif self.own is None and self.news is None and self.question:
            self.answer()  # the parent had said why, and was ended while it waited
        elif self.own is None and self.news is None:
            text = "ended without a word"
            self.tell(self.peers, {"process": self.process, "how": "lost", "text": text, "status": 1})

    def kill_parent(self):
        if self.leave_by is None and os.getppid() == self.parent_id:
            os.kill(self.parent_id, signal.SIGKILL)
        self.deadline = None

    def reply(self, message):
        # The parent may have ended while it waited, which `from_parent` sees.
        with contextlib.suppress(BrokenPipeError):
            os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def sentence(news):
    """What happened elsewhere, in one line."""
    name = f"process {news['process']}"
    if news["how"] == "lost":
        return f"{name} of this run {news['text']} (killed, or its machine is gone); this one ends too."
    return f"{name} of this run ended: {news['text']}"


def main(process, parent):
    """Watches over the process with the id `parent`, number `process` of its run."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    watcher = Watcher(process, parent)
    if process == 0:
        watcher.reply({"port": watcher.listen(), "secret": watcher.secret})
    watcher.run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
