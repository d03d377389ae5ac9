// Readers paste messages and flags into the search. Material for MkDocs reads `-`, `+`, `~`, `^` and `:`
// as operators, takes a backtick for a part of the word, and looks for all words that begin with
// "is". So the query is made plain before its worker gets it; the field keeps what was typed.
const SMALL = new Set(
  ("a an and are as at be but by do does for from got has have here how i if in is it its my not of " +
    "on or so than that the there this to was what when which why with").split(" ")
)

function plainQuery(typed) {
  const words = typed.split(/[^\p{L}\p{N}_.]+/u).map((word) => word.replace(/^\.+|\.+$/g, ""))
  const all = words.filter(Boolean)
  const large = all.filter((word) => !SMALL.has(word.toLowerCase()))
  return (large.length ? large : all).slice(0, 12).join(" ")
}

if (typeof Worker !== "undefined") {
  const post = Worker.prototype.postMessage
  Worker.prototype.postMessage = function (message, ...rest) {
    const isQuery = message && message.type === 2 && typeof message.data === "string"
    return post.call(this, isQuery ? { ...message, data: plainQuery(message.data) } : message, ...rest)
  }
}
