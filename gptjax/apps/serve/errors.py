"""Errors of a request, in the form of OpenAI's."""

from typing import Any


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: the value, the rule and the remedy, in one line.
        param: the field at fault; None for none.
        code: OpenAI's name for it; None where it has none.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON of the response."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
