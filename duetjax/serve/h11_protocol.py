"""uvicorn's HTTP/1.1 connection, with a time limit for whatever the client has to do.

What is not HTTP is answered in the house's error shape. A client that sends its request too slowly,
or does not read what it is sent, loses the connection.
"""

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from duetjax.serve.context import Context
from duetjax.serve.errors import HttpError, error_response

_HEAD, _BODY = "header_timeout_s", "body_timeout_s"


class TimedProtocol(H11Protocol):
    """A connection of an app whose state has a `Context`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        context: Context = self.config.app.state.context  # type: ignore[union-attr]
        self._limits = context.service.limits
        self._refuse = context.metrics.refuse
        self._reading: str | None = None  # the limit of what the client has begun to send
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new client, which must send the head of a request."""
        super().connection_made(transport)
        self._expect(_HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        self._expect(None)
        self._stop_waiting_for_room()

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request."""
        super().data_received(data)
        self._look_what_comes()

    def on_response_complete(self) -> None:
        """A response has been written, perhaps not to its last byte."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._wait_for_room()
        self._look_what_comes()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to."""
        super().pause_writing()
        self._wait_for_room()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._stop_waiting_for_room()

    def timeout_keep_alive_handler(self) -> None:
        """No further request has come."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self._wait_for_room()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when h11 refuses what the client sent."""
        self._send_error(HttpError(400, "malformed_http", msg.lower()))

    def _look_what_comes(self) -> None:
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._expect(_BODY)
        elif state is h11.IDLE and self.conn.trailing_data[0]:
            self._expect(_HEAD)
        else:
            self._expect(None)

    def _expect(self, reading: str | None) -> None:
        """Starts the clock for a part of a request unless it runs."""
        if reading == self._reading:
            return
        self._reading = reading
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
        if reading is not None and (seconds := getattr(self._limits, reading)):
            self._read_timer = self.loop.call_later(seconds, self._is_too_slow, reading)

    def _is_too_slow(self, reading: str) -> None:
        if self.transport.is_closing():
            return
        if reading == _BODY and not self.cycle.response_complete:
            return  # whoever reads the body has a clock of its own
        if reading == _BODY or not self.conn.trailing_data[0]:
            self.transport.abort()  # it was answered, or has asked for nothing
        else:
            seconds = self._limits.header_timeout_s
            why = f"the request's headers did not come within {seconds:g} s"
            self._send_error(HttpError(408, "request_timeout", why, reason=reading))

    def _wait_for_room(self) -> None:
        seconds = self._limits.slow_reader_timeout_s
        if seconds and self._write_timer is None:
            self._write_timer = self.loop.call_later(seconds, self._reads_too_slowly)

    def _stop_waiting_for_room(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _reads_too_slowly(self) -> None:
        self._write_timer = None
        if self.flow.write_paused or self.transport.is_closing():
            self._refuse("slow_reader_timeout_s")
            self.transport.abort()

    def _send_error(self, error: HttpError) -> None:
        """Answers, if no response has begun, and closes the connection."""
        self._refuse(error.reason)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error_response(error)
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(
                    status_code=error.status,
                    headers=headers,
                    reason=HTTPStatus(error.status).phrase.encode(),
                ),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the app must not write after this
            self.cycle.message_event.set()
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._wait_for_room()
