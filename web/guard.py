"""What a browser is told about the page: it may load nothing from anywhere else."""
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio builds its page by scripts and styles inside it, and shows images that it has as text.
POLICY = ("default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; "
          "form-action 'self'")


class OwnFilesOnly:
    """Adds headers to every answer, by which the browser refuses files and requests of other hosts."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, and add the headers to its answer."""
        async def send_with_headers(message: Message) -> None:
            if message['type'] == 'http.response.start':
                headers = MutableHeaders(scope=message)
                headers['Content-Security-Policy'] = POLICY
                headers['Referrer-Policy'] = 'no-referrer'
                headers['X-Content-Type-Options'] = 'nosniff'
            await send(message)

        await self.app(scope, receive, send_with_headers)
