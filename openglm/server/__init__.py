"""The server: OpenAI's protocol, Anthropic's messages and a chat page over one Engine.

    python -m openglm serve

    from openglm.server.app import create_app
    from openglm.server.service import Service
    app = create_app(Service(openglm.load()))      # any ASGI server runs it

app.py lists the endpoints, service.py makes requests of the engine, worker.py runs it, events.py is what every answer
is made of. Importing this folder imports nothing.
"""
