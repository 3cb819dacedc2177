"""Which text a model is to learn: every answer after exactly the prompt that a server would give it.

The rule, for one answer. *Context* is the conversation before it, rendered with the generation prompt: what a server
sends. *Answer* is what the template writes for that message as the last one, up to the token at which the model stops:
what a server is to get back. Where the render of the whole conversation begins with context + answer for every answer,
one sequence teaches them all. Else the conversation is unrolled: one sequence for each answer.
"""

from finetune_trainer.data.long_chats import MAX_EXACT_ANSWERS, of_a_long_one
from finetune_trainer.data.prompts import Server, continues, place_of
from finetune_trainer.data.renders import Chat, Renders
from finetune_trainer.data.sequences import Learnable, Note, RenderedSequence
from finetune_trainer.data.stops import Ends
from finetune_trainer.data.template import ChatTemplate


def learnable(template: ChatTemplate, chat: Chat, ends: Ends) -> Learnable:
    """Return what to learn of a conversation, by the rule. Raises AnswerError, and what a template raises."""
    renders = Renders(template, chat)
    server = Server(renders, ends)
    asked = [index for index, learned in enumerate(chat.learned) if learned]
    if len(asked) > MAX_EXACT_ANSWERS:
        found = of_a_long_one(renders, server, ends.stops)
        if found is not None:
            return found
    answers = [server.served(index, chat.variables) for index in asked]
    variables = answers[0].variables
    if all(each.variables == variables for each in answers):
        last = answers[-1].context + answers[-1].answer
        whole = renders.whole(variables)
        whole = last if last.startswith(whole) else whole  # all but the last answer's own stop token
        if all(continues(whole, each) for each in answers):
            return Learnable([whole], [place_of(each, 0) for each in answers], frozenset(renders.notes))
    if len(answers) > 1:
        renders.notes.add(Note.UNROLLED)
    texts = [each.context + each.answer for each in answers]
    return Learnable(texts, [place_of(each, number) for number, each in enumerate(answers)], frozenset(renders.notes))


def everything(template: ChatTemplate, chat: Chat) -> RenderedSequence:
    """Return the whole conversation, and from where its first answer begins to its end, for learning all of it."""
    renders = Renders(template, chat)
    whole = renders.whole(chat.variables)
    before = renders.context(chat.learned.index(True), chat.variables)
    return RenderedSequence(whole, [(len(before) if whole.startswith(before) else None, len(whole))])


def marks_differ(template: ChatTemplate, chat: Chat, ends: Ends) -> bool:
    """Whether `{% generation %}` marks, in any learned answer as the last message, another part than the rule says."""
    renders = Renders(template, chat)
    server = Server(renders, ends)
    for index in (index for index, learned in enumerate(chat.learned) if learned):
        served = server.served(index, chat.variables)
        text = template.render(chat.messages[: index + 1], False, chat.tools, served.variables)
        marked = template.marked[-1] if template.marked else ""
        begin, answer = text.rfind(marked), served.answer
        if not marked or begin != len(served.context) or not (ends.cut(marked) or marked).startswith(answer.rstrip()):
            return True
    return False
