// The JDK's HttpClient at its defaults: it asks for an upgrade to HTTP/2 with every first request.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

class JavaHttpClient {
  static final HttpClient CLIENT = HttpClient.newHttpClient();
  static final Pattern STRING = Pattern.compile("\"((?:[^\"\\\\]|\\\\.)*)\"");
  static final Pattern CONTENT = Pattern.compile("\"content\":\"((?:[^\"\\\\]|\\\\.)*)\"");

  public static void main(String[] arguments) throws Exception {
    String ability = arguments[0], url = arguments[1] + "/chat/completions";
    String input = new String(System.in.readAllBytes(), "UTF-8");
    String say = field(input, "say"), model = field(input, "model");
    String key = ability.equals("silence_key") ? "silence" : null;
    String text = "";
    if (ability.equals("chat")) {
      for (int i = 0; i < 3; i++) {
        HttpResponse<String> answer =
            CLIENT.send(request(url, say, model, false, null), HttpResponse.BodyHandlers.ofString());
        if (answer.statusCode() != 200) throw new IllegalStateException(answer.body());
        Matcher content = CONTENT.matcher(answer.body());
        content.find();
        text = content.group(1);
      }
    } else {
      StringBuilder whole = new StringBuilder();
      HttpResponse<java.util.stream.Stream<String>> answer =
          CLIENT.send(request(url, say, model, true, key), HttpResponse.BodyHandlers.ofLines());
      if (answer.statusCode() != 200) throw new IllegalStateException("status " + answer.statusCode());
      answer.body().filter(line -> line.startsWith("data: ")).forEach(line -> {
        Matcher content = CONTENT.matcher(line);
        if (content.find()) whole.append(content.group(1));
      });
      text = whole.toString();
    }
    System.out.write(("\n{\"text\":\"" + text + "\"}\n").getBytes("UTF-8"));
    System.out.flush();
  }

  /** A field's JSON string as it is written, which fits into another document as it is. */
  static String field(String json, String name) {
    Matcher matcher = Pattern.compile("\"" + name + "\": *" + STRING.pattern()).matcher(json);
    if (!matcher.find()) throw new IllegalArgumentException("no " + name);
    return matcher.group(1);
  }

  static HttpRequest request(String url, String say, String model, boolean stream, String key) {
    String body = "{\"model\":\"" + model + "\",\"temperature\":0,\"stream\":" + stream
        + ",\"messages\":[{\"role\":\"user\",\"content\":\"" + say + "\"}]}";
    HttpRequest.Builder builder = HttpRequest.newBuilder(URI.create(url))
        .header("Content-Type", "application/json")
        .POST(HttpRequest.BodyPublishers.ofString(body));
    if (key != null) builder.header("Idempotency-Key", key);
    return builder.build();
  }
}
