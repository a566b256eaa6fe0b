"""Conversations whose token ids transformers computed with the real Gemma 3 vocabulary
(reference/prompt-ids.json).
"""

# Gemma's rules in jinja: system text before the first user turn, alternating roles, everything
# trimmed, one item after the other
TEMPLATE = """{{ bos_token }}
{%- set turns = messages -%}
{%- set lead = '' -%}
{%- if turns[0].role == 'system' -%}
    {%- set first = turns[0].content -%}
    {%- set lead = (first if first is string else first[0].text) + '\\n\\n' -%}
    {%- set turns = turns[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (loop.index0 % 2 == 1) != (turn.role == 'assistant') -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {%- set role = 'model' if turn.role == 'assistant' else turn.role -%}
    {{ '<start_of_turn>' ~ role ~ '\\n' ~ (lead if loop.first else '') }}
    {%- if turn.content is string -%}
        {{ turn.content | trim }}
    {%- else -%}
        {%- for item in turn.content -%}
            {%- if item.type == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item.type == 'audio' -%}{{ '<audio_soft_token>' }}
            {%- else -%}{{ item.text | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""


def _turns(*contents, system=None):
    roles = ("user", "assistant")
    lead = [{"role": "system", "content": system}] if system else []
    return lead + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


# "@image" and "@audio" stand for a picture (3 soft tokens) and a clip
CONVERSATIONS = {
    "one turn": _turns("Why is the sky blue?"),
    "white space": _turns(
        "  \n\n Why  is\tthe sky\n\n\nblue?  \n", "\nBecause.  ", "\n  And at night? "
    ),
    "system": _turns(
        "Who are you?", "A pirate!", "Really?", system="You are a pirate.\nSpeak like one. "
    ),
    "unicode": _turns("naïve café 日本語 🙂 ﬁ \u200b٣"),
    "code": _turns(
        "def f(x):\n    return x < 3 and x > 1\n\n<table><tr><td>1</td></tr></table> "
        "[multimodal] 12345 __init__"
    ),
    "text items": _turns(["first item ", " second item"], "ok", ["third"]),
    "image": _turns(["What is this?", "@image"]),
    "image first": _turns(["@image", "\n What is this? "], "A cat.", "Sure?"),
    "two images": _turns(["Compare ", "@image", " with ", "@image", "please"], system="Be brief."),
    "neighbours": _turns(["@image", "@image"]),
    "audio": _turns(["@audio", "Transcribe."]),
    "audio last": _turns(["Answer what you hear:", "@audio"], "It is noon.", ["@audio"]),
    "both": _turns(["Look ", "@image", " and listen", "@audio"]),
}

GEMMA3 = {
    "bos": 2,
    "eos": 1,
    "unk": 3,
    "pad": 0,
    "start_of_turn": 105,
    "end_of_turn": 106,
    "start_of_image": 255999,
    "end_of_image": 256000,
}
GEMMA3N = {**GEMMA3, "start_of_audio": 256000}


def manifest(
    family="gemma3", chat_template=TEMPLATE, special_tokens=GEMMA3, special_rows=(), n_soft_tokens=3
):
    from edge_gemma.bundles.manifest import (
        DecoderPart,
        File,
        Manifest,
        Source,
        VisionPart,
    )

    decoder = DecoderPart(
        file="decoder.gguf",
        n_layer=1,
        n_embd=8,
        n_ff=8,
        n_head=1,
        n_head_kv=1,
        head_dim=8,
        n_vocab=262144,
        header_bytes=0,
        header_sha256="0" * 64,
        n_ctx_train=32768,
        sliding_window=512,
        kv_layers=("global",),
    )
    vision = VisionPart(
        file="vision.onnx",
        kind="siglip",
        precision="f32",
        n_embd=8,
        n_soft_tokens=n_soft_tokens,
        image_sizes=(896,),
        mean=0.5,
        std=0.5,
        weights_bytes=1,
        activation_bytes={"896": 1},
    )
    files = {name: File(size=0, sha256="0" * 64) for name in ("decoder.gguf", "vision.onnx")}
    return Manifest(
        name="tiny",
        family=family,
        instruct=chat_template is not None,
        decoder=decoder,
        source=Source(origin="test"),
        files=files,
        chat_template=chat_template,
        special_tokens=special_tokens,
        special_rows=special_rows,
        vision=vision,
    )
