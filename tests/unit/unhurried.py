"""Who looks at grammars, and takes as long as a test likes."""

import threading

from fake_engine import PATIENCE


class Unhurried:
    """Implements `checker._Child`: says `fault` of each grammar when it may; asked: of which."""

    def __init__(self, fault=""):
        self.fault = fault
        self.may_answer = threading.Event()
        self.asked = []

    def ask(self, text, _):
        self.asked.append(text)
        assert self.may_answer.wait(PATIENCE)
        return self.fault

    def kill(self):
        pass
