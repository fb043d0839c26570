"""Domain errors: raised where the fault is seen, turned into HTTP in one place (`api/errors.py`) and into an exit code
in another (`cli`)."""


class ServerError(Exception):
    """Base of all errors that a user is meant to read: one sentence, no paths of ours, no exception text of a
    library."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SettingError(ServerError):
    """A setting has a value that is not allowed; the message names the setting, the value and what is allowed."""


class ModelLoadError(ServerError):
    """The model can't be found, downloaded or loaded; the message names the file or model, the fault and the remedy."""


class InvalidRequestError(ServerError):
    """The request is wrong (HTTP 400). `param` is the field's path, such as `messages[0].content`."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """The prompt leaves no room for an answer.

    `anthropic_message` says so in Anthropic's words: clients look for them, and then shorten the conversation.
    """

    def __init__(self, message: str, anthropic_message: str, *, param: str) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")
        self.anthropic_message = anthropic_message


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that is not served (HTTP 404)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_found")


class OverloadedError(ServerError):
    """The request can't be taken now and may be sent again (HTTP 503 with Retry-After): engine starting, queue full."""

    def __init__(self, message: str, *, code: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class ClientLimitError(OverloadedError):
    """This client has too many requests waiting (HTTP 429 with Retry-After); others may still be served."""


class RequestTimeoutError(ServerError):
    """The request ran longer than `--timeout` (HTTP 504); its work is cancelled."""


class GenerationError(ServerError):
    """The engine could not finish a request that it had accepted (HTTP 500). `code` is stable, for programs."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code
