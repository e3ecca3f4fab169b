"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

CONTEXT_LENGTH = "context_length_exceeded"


class ApiError(Exception):
    """An answer to a request that is not served.

    The official client repeats a request on 408, 409, 429 and 5xx; `x-should-retry: false` tells it not to, where
    repeating cannot help.

    Attributes:
        status: the HTTP status.
        message: one line: what is wrong, and what to do.
        param: the field of the request that is wrong, or None.
        code: a word that programs look at, or None.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"retry-after": str(retry_after)} if retry_after is not None else {}
        if retry_after is None and status >= 500:
            self.headers["x-should-retry"] = "false"

    @property
    def body(self) -> dict:
        """The JSON of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 about the field `param`, which the message begins with."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code=code)
