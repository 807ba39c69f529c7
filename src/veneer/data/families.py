"""Named chat templates, for tokenizers that carry none or the wrong one.

| name | a turn | ends in |
| --- | --- | --- |
| chatml, qwen | <|im_start|>role, newline, text | <|im_end|> |
| llama3 | <|start_header_id|>role<|end_header_id|>, blank line, text | <|eot_id|> |
| gemma | <start_of_turn>user or model, newline, text | <end_of_turn> |
| mistral | [INST] text [/INST] and the answer | the tokenizer's EOS |
| alpaca | ### Instruction: and ### Response: | the tokenizer's EOS |
| vicuna | USER: text ASSISTANT: text | the tokenizer's EOS |

A base model without a template gets alpaca's, not the chatml or llama3 form that its vocabulary may have tokens for: a
base model has never seen those tokens, their embeddings are untrained and frozen under LoRA, while words and EOS are
known to it. None of these writes a system prompt of its own accord, save the sentence that vicuna and alpaca were
trained under.

`bos_token` is here the empty text if the tokenizer does not begin texts with one.
"""

from __future__ import annotations

from veneer.core.registry import Registry

__all__ = ["FALLBACK", "FAMILIES"]

FALLBACK = "alpaca"

FAMILIES: Registry[str] = Registry("chat template")

FAMILIES["chatml"] = FAMILIES["qwen"] = r"""
{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\n' + (system + '\n\n' if system else '') }}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif system %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n' if message.content or not loop.first }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

FAMILIES["llama3"] = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

# Gemma 1 and 2 know no system turn: its text opens the first user turn, as Gemma 3's own template has it.
FAMILIES["gemma"] = r"""
{{- bos_token }}
{%- set state = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set state.system = message.content | trim + '\n\n' %}
    {%- else %}
        {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
        {{- state.system + message.content | trim + '<end_of_turn>\n' }}
        {%- set state.system = '' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}
"""

FAMILIES["mistral"] = r"""
{{- bos_token }}
{%- set state = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set state.system = message.content + '\n\n' %}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' + state.system + message.content + ' [/INST]' }}
        {%- set state.system = '' %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('this mistral template has no ' + message.role + ' turns') }}
    {%- endif %}
{%- endfor %}
"""

FAMILIES["alpaca"] = r"""
{{- bos_token }}
{%- if messages[0].role != 'system' %}
    {{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}
    {{- '\n\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\n\n' }}
    {%- elif message.role == 'user' %}
        {{- '### Instruction:\n' + message.content + '\n\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '### Response:\n' + message.content + eos_token + '\n\n' }}
    {%- else %}
        {{- raise_exception('the alpaca template has no ' + message.role + ' turns') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\n' }}{%- endif %}
"""

FAMILIES["vicuna"] = r"""
{{- bos_token }}
{%- if messages[0].role != 'system' %}
    {{- 'A chat between a curious user and an artificial intelligence assistant. ' }}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + ' ' }}
    {%- elif message.role == 'user' %}
        {{- 'USER: ' + message.content + ' ' }}
    {%- elif message.role == 'assistant' %}
        {{- 'ASSISTANT: ' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('the vicuna template has no ' + message.role + ' turns') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}
"""
