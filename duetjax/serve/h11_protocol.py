"""uvicorn's HTTP/1.1 connection, answering what is not HTTP in the house's error shape."""

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from duetjax.serve.errors import HttpError, error_response


class JsonErrorProtocol(H11Protocol):
    """Closes the connection after malformed input, with a JSON 400 if no response has begun."""

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when h11 refuses what the client sent."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error_response(HttpError(400, "malformed_http", msg.lower()))
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the app must not write after this
            self.cycle.message_event.set()
        self.transport.close()
